"""The parameters of the operations that make new pictures of old ones, checked; their defaults stand here alone."""

from __future__ import annotations

from dataclasses import dataclass

from workers import augmentations, imagefiles
from workers.paramchecks import flag, number, odd, one_of, whole
from workers.placing import INTERPOLATIONS, MOST_PIXELS

FITS = ("inside", "pad", "cover", "stretch")
NORMALISATIONS = ("stretch", "equalise", "clahe", "grey-world")
SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class File:
    """What every operation has.

    Attributes:
        format, quality: of the files, see workers.imagefiles.encode.
    """

    format: str = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        imagefiles.check_format(self.format, self.quality)


@dataclass(frozen=True, slots=True)
class Moved(File):
    """What every operation has that moves pixels.

    Attributes:
        min_visibility: objects of whose box a smaller share is left are dropped, 0..1.
    """

    min_visibility: float = 0.1

    def __post_init__(self) -> None:
        File.__post_init__(self)
        number("min_visibility", self.min_visibility, 0, 1)


@dataclass(frozen=True, slots=True)
class Resize(Moved):
    """To another size.

    Attributes:
        width, height: pixels; 0 for one of them means that it follows from the other and the picture's shape.
        fit: where width and height are given: "inside" keeps the shape and one side may be shorter; "pad" fills that up
            with grey; "cover" cuts off the middle's surroundings; "stretch" changes the shape.
        interpolation: "auto" takes area for shrinking and linear for enlarging.
        enlarge: False leaves pictures that are small enough as they are; not for "cover" and "stretch".
        grey: 0..255, of what is added.
    """

    width: int = 640
    height: int = 640
    fit: str = "inside"
    interpolation: str = "auto"
    enlarge: bool = True
    grey: int = 114

    def __post_init__(self) -> None:
        Moved.__post_init__(self)
        _size(self.width, self.height)
        one_of("fit", self.fit, FITS)
        one_of("interpolation", self.interpolation, INTERPOLATIONS)
        flag("enlarge", self.enlarge)
        whole("grey", self.grey, 0, 255)


@dataclass(frozen=True, slots=True)
class Crop(Moved):
    """A part of the picture, as it is.

    Attributes:
        width, height: pixels; of a smaller picture what there is.
        at: "centre", or "random": another place for each variant.
        seed: of the job, for random places.
    """

    width: int = 224
    height: int = 224
    at: str = "centre"
    seed: int = 0

    def __post_init__(self) -> None:
        Moved.__post_init__(self)
        whole("width", self.width, 1, 65_535)
        whole("height", self.height, 1, 65_535)
        one_of("at", self.at, ("centre", "random"))
        whole("seed", self.seed, 0, SEEDS - 1)


@dataclass(frozen=True, slots=True)
class Pad(Moved):
    """Grey around the picture.

    Attributes:
        width, height: pixels at least; 0 for the picture's own.
        multiple: of which both sides become multiples.
        at: "centre", or "corner": the picture lies in the upper left one.
        grey: 0..255.
    """

    width: int = 0
    height: int = 0
    multiple: int = 32
    at: str = "centre"
    grey: int = 114

    def __post_init__(self) -> None:
        Moved.__post_init__(self)
        for name in ("width", "height"):
            whole(name, getattr(self, name), 0, 65_535)
        whole("multiple", self.multiple, 1, 4096)
        one_of("at", self.at, ("centre", "corner"))
        whole("grey", self.grey, 0, 255)


@dataclass(frozen=True, slots=True)
class Normalise(File):
    """Brightness and colours made comparable.

    Attributes:
        method: "stretch" spreads each channel from its low to its high percentile over 0..255; "equalise" makes all
            brightnesses alike often; "clahe" does that within tiles; "grey-world" makes the channels' means equal.
        low, high: percentiles for "stretch".
        clip: limit of contrast for "clahe".
        tiles: along each side, for "clahe".
    """

    method: str = "stretch"
    low: float = 1.0
    high: float = 99.0
    clip: float = 2.0
    tiles: int = 8

    def __post_init__(self) -> None:
        File.__post_init__(self)
        one_of("method", self.method, NORMALISATIONS)
        number("low", self.low, 0, 100)
        number("high", self.high, self.low, 100)
        number("clip", self.clip, 0.1, 1000)
        whole("tiles", self.tiles, 1, 64)


@dataclass(frozen=True, slots=True)
class Gaussian(File):
    """A blur, as cv2.GaussianBlur.

    Attributes:
        sigma: standard deviation in pixels; 0 means that it follows from ksize.
        ksize: pixels of the kernel's side, odd; 0 means that it follows from sigma.
    """

    sigma: float = 1.5
    ksize: int = 0

    def __post_init__(self) -> None:
        File.__post_init__(self)
        number("sigma", self.sigma, 0, 100)
        if self.ksize or not self.sigma:
            odd("ksize", self.ksize, 999)


@dataclass(frozen=True, slots=True)
class Average(File):
    """The mean of each pixel's surroundings, as cv2.blur.

    Attributes:
        ksize: pixels of the kernel's side, odd.
    """

    ksize: int = 3

    def __post_init__(self) -> None:
        File.__post_init__(self)
        odd("ksize", self.ksize, 999)


@dataclass(frozen=True, slots=True)
class Sobel(File):
    """Edges: how fast the brightness changes, as cv2.Sobel.

    Attributes:
        ksize: pixels of the kernel's side: 1, 3, 5 or 7.
        direction: "x" or "y", of which the magnitude is taken, or "both": the length of the gradient.
        scale: what the numbers are multiplied with before they are cut off at 255.
        grey: of the brightness; False takes each channel by itself.
    """

    ksize: int = 3
    direction: str = "both"
    scale: float = 1.0
    grey: bool = True

    def __post_init__(self) -> None:
        File.__post_init__(self)
        odd("ksize", self.ksize, 7)
        one_of("direction", self.direction, ("both", "x", "y"))
        number("scale", self.scale, 0, 1000)
        flag("grey", self.grey)


@dataclass(frozen=True, slots=True)
class Laplacian(File):
    """Edges: how much a pixel differs from its surroundings, as the magnitude of cv2.Laplacian.

    Attributes:
        ksize: pixels of the kernel's side: 1, 3, 5 or 7; 1 is the cross of four neighbours.
        scale: what the numbers are multiplied with before they are cut off at 255.
        grey: of the brightness; False takes each channel by itself.
    """

    ksize: int = 1
    scale: float = 1.0
    grey: bool = True

    def __post_init__(self) -> None:
        File.__post_init__(self)
        odd("ksize", self.ksize, 7)
        number("scale", self.scale, 0, 1000)
        flag("grey", self.grey)


@dataclass(frozen=True, slots=True)
class Augment(Moved):
    """A pipeline of albumentations, another outcome for each variant.

    Attributes:
        pipeline: one of augmentations.PRESETS, or what A.to_dict gives: as JSON, or the path of a JSON file. It is read
            when the job is made, so that the recipe holds the pipeline itself.
        seed: of the job.
    """

    pipeline: str = "light"
    seed: int = 0

    def __post_init__(self) -> None:
        Moved.__post_init__(self)
        whole("seed", self.seed, 0, SEEDS - 1)
        object.__setattr__(self, "pipeline", augmentations.spelled(self.pipeline))


def _size(width: int, height: int) -> None:
    whole("width", width, 0, 65_535)
    whole("height", height, 0, 65_535)
    if not width and not height:
        raise ValueError("give width, height or both")
    if width * height > MOST_PIXELS:
        raise ValueError(f"width x height must be at most {MOST_PIXELS} pixels, but got {width}x{height}")
