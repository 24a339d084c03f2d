/* Nodes that answer with a page of text (Inspect Wan File, Wan Plan, Wan Training Data) show it on themselves. */

import { app } from "../../scripts/app.js";

const STYLE = `font: 11px monospace; white-space: pre-wrap; overflow: auto; resize: none; width: 100%; height: 100%;
  box-sizing: border-box; padding: 6px; border: none; border-radius: 4px; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222);`;

/** The box for the page, made when there is the first one. */
function boxOf(node) {
  if (node.wanflowReport) return node.wanflowReport;
  const box = document.createElement("textarea");
  box.readOnly = true;
  box.style.cssText = STYLE;
  const widget = node.addDOMWidget("page", "wanflow_report", box, { serialize: false, getMinHeight: () => 200 });
  widget.serialize = false;  // it is what came out, no value of the workflow
  node.setSize([Math.max(node.size[0], 460), Math.max(node.size[1], node.computeSize()[1])]);
  return node.wanflowReport = box;
}

app.registerExtension({
  name: "WanFlow.report",

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("WanFlow")) return;
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (!output?.text) return;
      boxOf(this).value = [output.text].flat().join("\n");
      this.setDirtyCanvas(true);
    };
  },
});
