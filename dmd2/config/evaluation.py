"""The keys of samplers, pairs, features and the evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.config.base import WIDEST, Model, Precision, Seed, WeightsFile
from dmd2.config.data import Prompts
from dmd2.config.protocols import PROTOCOLS, MeasureName
from dmd2.config.protocols import Name as ProtocolName


class Features(Model):
    """The named feature extractor of the Frechet distance."""

    kind: str = Field(description="key of metrics.EXTRACTORS")
    weights: WeightsFile | None = None
    seed: Seed = 0
    epochs: int = Field(5, gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    augment: Literal[True] | None = Field(
        None, description="of pair_classifier: digits are recombined, rotated, scaled and shifted in training"
    )
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the data kept back to measure accuracy")
    reference: WeightsFile | None = Field(None, description="published statistics of the real images (EDM's .npz)")

    @model_validator(mode="after")
    def _augments_pairs(self) -> Self:
        if self.augment and self.kind != "pair_classifier":
            raise ValueError(f"`augment` belongs to kind pair_classifier, not {self.kind}")
        return self


class Pairs(Model):
    """Noise-image pairs of the teacher's deterministic sampler, for the original DMD's regression loss."""

    num_pairs: int = Field(25_000, gt=0)
    sampler: str = Field("ode", description="key of `samplers`")
    seed: Seed = 20_000_000
    shard_size: int = Field(1000, gt=0)


class Sampler(Model):
    """A sampler of the teacher (`heun`, or a scheduler of `diffusers`) or of a student (`few_step`)."""

    kind: Literal["heun", "few_step", "diffusers"]
    num_steps: int | None = Field(None, gt=0)
    scheduler: str | None = Field(None, description="diffusers: class such as EulerDiscreteScheduler")
    options: dict[str, Any] | None = Field(None, description="diffusers: of the scheduler, such as timestep_spacing")
    guidance_scale: float | None = Field(None, ge=1, description="classifier-free guidance; none: 1")
    s_churn: float = Field(0.0, ge=0)
    s_min: float = Field(0.0, ge=0)
    s_max: float | None = None
    s_noise: float = Field(1.0, gt=0)
    precision: Precision = "fp32"  # of the network; the released code evaluates in fp32
    checkpoint: Literal["last", "best"] | Annotated[int, Field(gt=0)] = Field(
        "last", description="of a student: the last, the best snapshot by FID on the curve, or that of an iteration"
    )
    ema_length: float | None = Field(
        None, gt=0, lt=WIDEST, description="of a student: width of its average, of a run with `ema_lengths`"
    )

    @property
    def of_teacher(self) -> bool:
        """Whether it samples from a teacher, not from a student."""
        return self.kind != "few_step"

    @property
    def is_selected(self) -> bool:
        """Whether a student's weights are selected or combined from its snapshots."""
        return self.checkpoint != "last" or self.ema_length is not None

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        if self.of_teacher != (self.num_steps is not None):
            raise ValueError("`num_steps` belongs to a teacher's sampler, and only there: a student's are its run's")
        if self.kind == "heun" and self.num_steps == 1:
            raise ValueError("`num_steps` of kind heun must be at least 2")
        if self.kind != "heun" and (self.s_churn, self.s_min, self.s_max, self.s_noise) != (0.0, 0.0, None, 1.0):
            raise ValueError("`s_churn`, `s_min`, `s_max` and `s_noise` belong to kind heun, and only there")
        if (self.kind == "diffusers") != (self.scheduler is not None) or (self.options and self.kind != "diffusers"):
            raise ValueError("`scheduler` and `options` belong to kind diffusers, and only there")
        if self.guidance_scale is not None and not self.of_teacher:
            raise ValueError("`guidance_scale` belongs to a teacher's sampler: a student is not guided")
        if self.of_teacher and self.is_selected:
            raise ValueError("`checkpoint` and `ema_length` belong to kind few_step: a teacher has one set of weights")
        if self.ema_length is not None and self.checkpoint == "best":
            raise ValueError("`ema_length` combines snapshots up to a checkpoint; set that to `last` or an iteration")
        if self.s_max is not None and self.s_max < self.s_min:
            raise ValueError(f"s_max {self.s_max} is below s_min {self.s_min}: no step would be stochastic")
        return self


class ClipModel(Model):
    """The CLIP network of `clip_score`, by its names in open_clip; the default is that of the published figures."""

    model: str = "ViT-g-14"
    pretrained: str = Field("laion2b_s12b_b42k", description="fetched from Hugging Face unless `weights` is set")
    weights: WeightsFile | None = Field(None, description="its weights as a file: .safetensors, .bin or .pt")


class Latency(Model):
    """How the time of one image is measured: batch 1, in the parts text encoder, network and decoder."""

    warm_up: int = Field(3, ge=0, description="images that do not count")
    repeats: int = Field(20, gt=1, description="images of which tables give the median")
    precision: Precision | None = Field(None, description="of the network; none: the sampler's")


class Evaluation(Model):
    """Number of samples and how they are compared."""

    num_samples: int = Field(50_000, gt=0, description="samples per seed block")
    num_blocks: int = Field(3, gt=0, description="independent blocks; tables give mean and standard deviation")
    seed: Seed = 0
    protocols: tuple[ProtocolName, ...] = Field(
        ("edm",),
        min_length=1,
        description="protocols.PROTOCOLS; the first one's distance is `fid`, the others' are `fid_NAME`",
    )
    streamed: bool = Field(
        False, description="samples are only added to the statistics; `num_shown` are stored as images"
    )
    num_shown: int = Field(100, gt=0, description="stored samples of a streamed evaluation, for the sheets")
    curve_samples: int = Field(5_000, gt=0, description="samples per snapshot of the FID-against-training curve")
    prompts: Prompts | None = Field(None, description="sample i has prompt i modulo their number; none: classes")
    measures: tuple[MeasureName, ...] | None = Field(
        None, min_length=1, description="keys of metrics.MEASURES; none: the default of the data's kind of labels"
    )
    clip: ClipModel | None = Field(None, description="network of clip_score; none: ViT-g-14 of open_clip")
    latency: Latency | None = Field(None, description="times images for tables with `latency_s`; none: not measured")
    vgg_weights: WeightsFile | None = Field(None, description="torchvision's VGG-16, for lpips_diversity")

    def of_real_images(self) -> Evaluation | None:
        """The keys on which the statistics of real images depend; None if those are the defaults."""
        name = self.protocols[0]
        changes: dict[str, Any] = {"measures": self.measures} if self.measures else {}
        if PROTOCOLS[name].bicubic:
            changes["protocols"] = (name,)
        return Evaluation(**changes) if changes else None

    @model_validator(mode="after")
    def _protocols_differ(self) -> Self:
        if len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols {list(self.protocols)}: one is listed twice")
        if len({PROTOCOLS[name].sampling for name in self.protocols}) > 1:
            raise ValueError(f"protocols {list(self.protocols)}: they sample differently; use one of them at a time")
        if self.measures and len(set(self.measures)) < len(self.measures):
            raise ValueError(f"measures {list(self.measures)}: one is listed twice")
        if self.measures and "fid" not in self.measures:
            raise ValueError(f"measures {list(self.measures)}: `fid` is missing, by which snapshots are chosen")
        return self
