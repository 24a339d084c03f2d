/* Wan Train shows how it goes on the node itself: the loss as a curve, the videos made on the way, a button to finish.
   The server sends the state as "wanflow.training" (nodes/watch.py); the last one comes again as the node's output. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const LEFT = 44, RIGHT = 8, TOP = 10, BOTTOM = 20;
const STYLE = `
.wanflow-training { display: flex; flex-direction: column; gap: 6px; color: var(--input-text, #ddd);
  font: 12px sans-serif; overflow: hidden; }
.wanflow-training svg { width: 100%; flex: 1 1 auto; min-height: 90px; background: rgba(0, 0, 0, 0.25); border-radius: 4px; }
.wanflow-training text { fill: currentColor; opacity: 0.6; font-size: 11px; }
.wanflow-training path { fill: none; }
.wanflow-training .head { display: flex; gap: 6px; align-items: center; min-height: 24px; }
.wanflow-training .head span { flex: 1; }
.wanflow-training .videos { display: flex; gap: 4px; }
.wanflow-training figure { margin: 0; flex: 1 1 0; min-width: 0; text-align: center; opacity: 0.9; }
.wanflow-training video { width: 100%; max-height: 150px; object-fit: contain; border-radius: 4px; }
.wanflow-training button { cursor: pointer; }
`;

/** The state drawn into `box`; `finish` is called when the button is pressed. */
function draw(box, state, finish) {
  box.querySelector("span").textContent = state.text;
  const button = box.querySelector("button");
  button.hidden = !state.running || !state.curve?.length;
  button.onclick = () => { button.disabled = true; finish(); };
  if (!state.running) button.disabled = false;
  if (state.curve?.length) drawChart(box.querySelector("svg"), state.curve, state.total);
  if (state.samples) showVideos(box.querySelector(".videos"), state.samples);
}

/** [step, loss, smoothed loss] points; the whole width is `total` steps. */
function drawChart(svg, points, total) {
  const width = svg.clientWidth || 400, height = svg.clientHeight || 160;
  const smooth = points.map((point) => point[2]), raw = points.map((point) => point[1]).sort((a, b) => a - b);
  const share = (part) => raw[Math.round(part * (raw.length - 1))];  // outliers would flatten the rest
  let low = Math.min(...smooth, share(0.02)), high = Math.max(...smooth, share(0.98));
  if (high - low < 1e-9) { low -= 1e-6; high += 1e-6; }
  const x = (step) => LEFT + (width - LEFT - RIGHT) * step / Math.max(total, 1);
  const y = (loss) => height - BOTTOM - (height - TOP - BOTTOM) * (Math.min(Math.max(loss, low), high) - low) / (high - low);
  const line = (column, color, thickness) => `<path stroke="${color}" stroke-width="${thickness}" d="M` +
    points.map((point) => `${x(point[0]).toFixed(1)} ${y(point[column]).toFixed(1)}`).join("L") + `"/>`;
  const word = (left, top, text, anchor) => `<text x="${left}" y="${top}" text-anchor="${anchor}">${text}</text>`;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.innerHTML = line(1, "#4c6a86", 1) + line(2, "#5cbeff", 2.5) +
    word(LEFT - 6, y(high) + 4, high.toPrecision(3), "end") + word(LEFT - 6, y(low) + 4, low.toPrecision(3), "end") +
    word(LEFT, height - 5, "0", "start") + word(width - RIGHT, height - 5, total, "end");
}

/** Only new videos are added, so that those that play go on. */
function showVideos(place, samples) {
  for (const figure of [...place.children])
    if (!samples.some((sample) => sample.filename === figure.dataset.file)) figure.remove();
  for (const sample of samples) {
    if ([...place.children].some((figure) => figure.dataset.file === sample.filename)) continue;
    const { step, ...address } = sample;
    const figure = document.createElement("figure"), video = document.createElement("video");
    figure.dataset.file = sample.filename;
    Object.assign(video, { src: api.apiURL(`/view?${new URLSearchParams(address)}`), muted: true, loop: true, autoplay: true });
    figure.append(video, document.createTextNode(`step ${step}`));
    place.append(figure);
  }
}

/** The node of an execution id; in a subgraph that is the ids on the way to it, with colons. */
function nodeOf(id) {
  let graph = app.graph, node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "WanFlow.training",

  setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    api.addEventListener("wanflow.training", ({ detail }) => nodeOf(detail.node)?.wanflowTraining?.(detail, detail.node));
  },

  nodeCreated(node) {
    if (node.comfyClass !== "WanFlowTrain") return;
    const box = document.createElement("div");
    box.className = "wanflow-training";
    box.innerHTML = `<div class="head"><span></span><button hidden title="Save, and go on with what was learnt so far">` +
      `Finish now</button></div><svg></svg><div class="videos"></div>`;
    const widget = node.addDOMWidget("training", "wanflow_training", box, { serialize: false, getMinHeight: () => 260 });
    widget.serialize = false;  // it is a picture, no value of the workflow
    node.wanflowTraining = (state, id) => {
      draw(box, state, () => api.fetchApi(`/wanflow/finish/${encodeURIComponent(id)}`, { method: "POST" }));
      node.setDirtyCanvas(true);
    };
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const [state] = output?.wanflow_training ?? [];
      if (state) node.wanflowTraining(state, node.id);
    };
  },
});
