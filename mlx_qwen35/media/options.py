"""Options of images and videos."""

from dataclasses import dataclass

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.image import MAX_PIXELS
from mlx_qwen35.media.pdf import DPI
from mlx_qwen35.options import check_fields, option, options_of, settle_switches, spelled


@dataclass(frozen=True)
class VisionOptions:
    """How images and videos are read and resized. None is the default, of the checkpoint or of this machine."""

    min_pixels: int | None = option(
        help="least pixels of an image, height x width; a smaller one is enlarged (default: the checkpoint's)",
        least=1, most=MAX_PIXELS, metavar="N", media="image",
    )  # fmt: skip
    max_pixels: int | None = option(
        help="most pixels of an image, height x width; a larger one is reduced (default: by this machine's memory)",
        least=1, most=MAX_PIXELS, metavar="N", media="image",
    )  # fmt: skip
    fps: float | None = option(
        help="frames of a video to use for each second (default: the checkpoint's, 2)",
        least=1e-6, most=1e6, metavar="X", media="video",
    )  # fmt: skip
    video_num_frames: int | None = option(
        help="frames of a video to use in all, instead of fps", least=1, most=10**7, metavar="N", media="video"
    )
    video_total_pixels: int | None = option(
        help="most pixels of all used frames of a video together, frames x height x width (default: by this machine's "
        "memory)", least=1, most=10**12, metavar="N", media="video",
    )  # fmt: skip
    source_fps: float | None = option(
        help="frames per second of a video that comes as a folder, a list or an array of images",
        least=1e-6, most=1e6, metavar="X", media="video",
    )  # fmt: skip
    dpi: int | None = option(
        help="pixels per inch of the pages of a PDF, fewer where a page would have more than max_pixels (default: "
        f"{DPI})", least=8, most=2400, metavar="N", media="PDF",
    )  # fmt: skip
    published_limits: bool = option(
        False, help="limit pixels as the checkpoint does, and not by this machine's memory", media="image or video"
    )
    outer_vision_tags: bool = option(
        False, media="video",
        help="put one pair of vision tags around a whole video, as transformers 5.10 and later do (default: one around "
        "each pair of frames, as when the model was released)",
    )  # fmt: skip
    allow_private_urls: bool = option(
        False, help="follow URLs that lead to this machine or into its network, which are refused otherwise"
    )

    def __post_init__(self) -> None:
        settle_switches(self)
        check_fields(self)
        if self.fps is not None and self.video_num_frames is not None:
            raise InputError(
                "option_conflict",
                f"{spelled('fps')} ({self.fps}) and {spelled('video_num_frames')} ({self.video_num_frames}) must not "
                "be given together: each says how many frames are used. Leave one out",
            )


VISION_OPTIONS = options_of(VisionOptions)
