"""Menu WanFlow/video: video files in and out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import Tensor

from ..wan_core.errors import FileError
from ..wan_core.size import pixel_size
from ..wan_core.video import FORMATS, VIDEO_SUFFIXES, Stream, parse_size, read_video, save_video
from .host import host, io
from .vae import in_colour, room, tiling, tiling_inputs
from .wires import WanVAE, latent_samples


class LoadVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = [path.name for path in host.input_dir().glob("*") if path.suffix.lower() in VIDEO_SUFFIXES]
        return io.Schema(
            node_id="WanFlowLoadVideo",
            display_name="Load Wan Video",
            category="WanFlow/video",
            description="Reads frames from a video file, at the frame rate and size you need.",
            inputs=[
                io.Combo.Input(
                    "video",
                    options=sorted(files),
                    upload=io.UploadType.video,
                    tooltip="A video in the input folder (mp4, webm, mov, mkv, avi, gif, webp).",
                ),
                io.Float.Input(
                    "frame_rate",
                    default=16.0,
                    min=0.0,
                    max=240.0,
                    step=0.01,
                    tooltip="Resample to this many frames a second. Wan was trained on 16; 0 keeps the file's rate.",
                ),
                io.Int.Input(
                    "num_frames", default=0, min=0, max=100000, tooltip="Read at most this many; 0 reads all."
                ),
                io.String.Input(
                    "size",
                    default="original",
                    tooltip="Width x height, such as 832x480: scaled to cover it, the overhang cut off. Or original.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames."),
                io.Float.Output(display_name="fps", tooltip="Their rate a second, for Save Wan Video."),
            ],
        )

    @classmethod
    def validate_inputs(cls, video):
        try:
            host.input_path(video)
        except FileError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, video, **_):
        path = host.input_path(video)
        facts = path.stat()
        return hashlib.sha256(f"{path} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()

    @classmethod
    def execute(cls, video, frame_rate, num_frames, size):
        frames, fps = read_video(host.input_path(video), frame_rate, num_frames, parse_size(size))
        return io.NodeOutput(frames.to(host.intermediate_device()), fps)


def file_inputs() -> list:
    return [
        io.String.Input(
            "filename_prefix",
            default="WanFlow/video",
            tooltip="Name below the output folder; a number is added. %year%, %month% and %day% are filled in.",
        ),
        io.Float.Input("frame_rate", default=16.0, min=0.01, max=240.0, step=0.01, tooltip="Frames a second."),
        io.Combo.Input(
            "format",
            options=list(FORMATS),
            default="mp4",
            tooltip="mp4 (H.264) plays everywhere; webm is VP9; webp an animated picture; png a file a frame.",
        ),
        io.Int.Input("quality", default=5, min=1, max=10, tooltip="1 for small files, 10 for the best."),
    ]


def audio_input() -> io.Audio.Input:
    return io.Audio.Input(
        "audio",
        optional=True,
        tooltip="Sound for mp4 and webm, cut or filled with silence to the length of the video.",
    )


def file_output() -> io.String.Output:
    return io.String.Output(display_name="file", tooltip="The path of the saved file (of the first frame).")


def save(node, images, filename_prefix, frame_rate, format, quality, audio) -> io.NodeOutput:
    """Write the video with the workflow that `node` runs in, and show it there."""
    target = host.output_path(filename_prefix, format)
    files = save_video(images, target.path, frame_rate, quality, host.metadata(node.hidden), audio)
    shown = [{"filename": file.name, "subfolder": target.subfolder, "type": "output"} for file in files]
    return io.NodeOutput(str(files[0]), ui={"images": shown, "animated": (format != "png",)})


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowSaveVideo",
            display_name="Save Wan Video",
            category="WanFlow/video",
            description="Saves frames as a video that carries this workflow: drop the file on ComfyUI to get it back.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The frames."),
                *file_inputs(),
                audio_input(),
            ],
            outputs=[file_output()],
        )

    @classmethod
    def execute(cls, images, filename_prefix, frame_rate, format, quality, audio=None):
        return save(cls, images, filename_prefix, frame_rate, format, quality, audio)


class DecodeAndSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowDecodeAndSave",
            display_name="Decode and Save Wan Video",
            category="WanFlow/video",
            description="Decodes a latent straight into a video file: frames are written while they are decoded, and "
            "are never held all at once. For long videos.",
            is_output_node=True,
            inputs=[
                WanVAE.Input("vae", tooltip="From Load Wan VAE."),
                io.Latent.Input("latent", tooltip="From Wan Sampler, or core's KSampler with a Wan model."),
                *file_inputs(),
                *tiling_inputs(),
                audio_input(),
            ],
            outputs=[file_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, vae, latent, filename_prefix, frame_rate, format, quality, tiled, tile_size, tile_stride, audio=None
    ):
        samples, tiles = latent_samples(latent), tiling(tiled, tile_size, tile_stride)
        frames, *picture = pixel_size(*samples.shape[2:])
        count = len(samples) * frames
        progress = host.progress(count, cls.hidden.unique_id, "frames")

        def pictures() -> Iterator[Tensor]:
            done = 0
            for group in vae.frames(samples, **tiles):  # (1, 3, t, H, W) in -1..1
                yield from in_colour(group)[0].movedim(0, -1)
                done += group.shape[2]
                progress.update(done)

        with host.attached(vae, room(vae.decoding_room, tuple(picture), tiles)):
            stream = Stream((count, *picture, 3), pictures())
            return save(cls, stream, filename_prefix, frame_rate, format, quality, audio)


NODES = [LoadVideo, SaveVideo, DecodeAndSave]
