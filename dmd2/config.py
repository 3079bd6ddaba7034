"""The keys of presets and runs, their types, ranges and defaults. No torch: the workflow plans its jobs with this.

Defaults are the paper's for ImageNet-64 (arXiv 2405.14867, appendix F.2) unless a comment says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dmd2.protocols import Name as ProtocolName


class Model(BaseModel):
    """Frozen, and unknown keys are errors. YAML's `3e-3`, which PyYAML reads as a string, counts as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""One word, so that (seed, step, rank) never means the same numbers as another such triple."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16"]
"""What networks compute in; weights, preconditioning and losses stay float32."""


class WeightsFile(Model):
    """A file that the user supplies, or that a rule fetches (`workflow/downloads.yaml`)."""

    path: str
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")


class Data(Model):
    """A labelled image data set."""

    source: str = Field(description="key of datasets.SOURCES")
    path: str | None = Field(None, description="folder or archive, for sources that read one")
    resolution: int = Field(gt=0)
    channels: Literal[1, 3] = 3
    num_classes: int = Field(gt=0)
    levels: int = Field(256, ge=2, le=256, description="grey levels of the source; samples are rounded to them")
    shard_size: int = Field(1000, gt=0, description="samples per shard")
    image_format: Literal["png", "webp"] = "webp"  # lossless either way
    max_unreadable: int = Field(0, ge=0, description="images that may be left out because they cannot be read")


class Network(Model):
    """EDM's U-Nets: ADM (Dhariwal and Nichol 2021, EDM's `DhariwalUNet`), or DDPM++ (Song et al. 2021, `SongUNet`)."""

    arch: Literal["adm", "ddpmpp"] = "adm"
    model_channels: int = Field(192, gt=0)
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = Field(4, gt=0)
    num_blocks: int = Field(3, gt=0)
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    channels_per_head: int = Field(64, gt=0, description="adm; ddpmpp has one head")
    augment_dim: int = Field(0, ge=0, description="ddpmpp: width of EDM's augmentation input, which is always 0 here")
    dropout: float = Field(0.0, ge=0, lt=1)  # 0.1 trained the published teacher; DMD2's networks use 0


class TeacherTraining(Model):
    """How a small EDM teacher is trained inside the workflow (Karras et al. 2022, table 1 and appendix F)."""

    seed: Seed = 0
    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_iterations: int = Field(100, ge=0)
    decay_from: float = Field(0.5, ge=0, le=1, description="share of the run after which the rate falls linearly")
    final_rate: float = Field(0.02, ge=0, le=1, description="share of the learning rate left at the end")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    p_mean: float = -1.2
    p_std: float = Field(1.2, gt=0)
    grad_clip: float = Field(10.0, gt=0)


class Teacher(Model):
    """The many-step diffusion model that is distilled: trained here, or read from a file."""

    kind: str = Field(description="key of teachers.TEACHERS")
    network: Network = Network()
    num_levels: int = Field(1000, gt=1)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    rho: float = Field(7.0, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    training: TeacherTraining | None = None
    weights: WeightsFile | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.training is not None and self.weights is not None:
            raise ValueError("set `training` or `weights`, not both")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must lie below sigma_max {self.sigma_max}")
        return self


class Features(Model):
    """The named feature extractor of the Frechet distance."""

    kind: str = Field(description="key of metrics.EXTRACTORS")
    weights: WeightsFile | None = None
    seed: Seed = 0
    epochs: int = Field(5, gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the data kept back to measure accuracy")
    reference: WeightsFile | None = Field(None, description="published statistics of the real images (EDM's .npz)")


class Pairs(Model):
    """Noise-image pairs of the teacher's deterministic sampler, for the original DMD's regression loss."""

    num_pairs: int = Field(25_000, gt=0)
    sampler: str = Field("ode", description="key of `samplers`")
    seed: Seed = 20_000_000
    shard_size: int = Field(1000, gt=0)


class Sampler(Model):
    """A sampler of the teacher (`heun`) or of a student (`few_step`, which has no settings)."""

    kind: Literal["heun", "few_step"]
    num_steps: int | None = Field(None, gt=1)
    s_churn: float = Field(0.0, ge=0)
    s_min: float = Field(0.0, ge=0)
    s_max: float | None = None
    s_noise: float = Field(1.0, gt=0)
    precision: Precision = "fp32"  # of the network; the released code evaluates in fp32
    checkpoint: Literal["last", "best"] = Field("last", description="of a student: best by FID on the curve, or last")

    @model_validator(mode="after")
    def _steps_belong_to_heun(self) -> Self:
        if (self.kind == "heun") != (self.num_steps is not None):
            raise ValueError("`num_steps` belongs to kind heun, and only there: a student's steps are its run's")
        if self.kind == "few_step" and (self.s_churn, self.s_min, self.s_max, self.s_noise) != (0.0, 0.0, None, 1.0):
            raise ValueError("`s_churn`, `s_min`, `s_max` and `s_noise` belong to kind heun, and only there")
        if self.kind == "heun" and self.checkpoint == "best":
            raise ValueError("`checkpoint` belongs to kind few_step: a teacher has one set of weights")
        if self.s_max is not None and self.s_max < self.s_min:
            raise ValueError(f"s_max {self.s_max} lies below s_min {self.s_min}: no step would be stochastic")
        return self


class Evaluation(Model):
    """How samples are counted and compared."""

    num_samples: int = Field(50_000, gt=0, description="samples per seed block")
    num_blocks: int = Field(3, gt=0, description="independent blocks; tables give mean and standard deviation")
    seed: Seed = 0
    protocols: tuple[ProtocolName, ...] = Field(
        ("edm",),
        min_length=1,
        description="protocols.PROTOCOLS; the first one's distance is `fid`, others stand beside it",
    )
    streamed: bool = Field(False, description="samples go to the statistics and only `num_shown` are stored as images")
    num_shown: int = Field(100, gt=0, description="stored samples of a streamed evaluation, for the sheets")
    curve_samples: int = Field(5_000, gt=0, description="samples per snapshot of the FID-against-training curve")

    @model_validator(mode="after")
    def _protocols_differ(self) -> Self:
        if len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols {list(self.protocols)}: one stands twice")
        return self


class Train(Model):
    """One DMD2 run (paper, algorithm 1; released ImageNet script for the numbers)."""

    seed: Seed = 10
    iterations: int = Field(200_000, gt=0, description="critic updates; the generator moves on every R-th")
    batch_size: int = Field(280, gt=0, description="global, whatever the number of devices")
    num_snapshots: int = Field(20, gt=0, description="evenly spaced exports for the FID-against-training curve")

    critic_steps_per_generator: int = Field(5, gt=0, description="R of the two time-scale update rule")
    matching_weight: float = Field(1.0, ge=0, description="0 leaves the GAN alone")
    gan_generator_weight: float = Field(3e-3, ge=0)
    gan_critic_weight: float = Field(1e-2, ge=0)
    gan_loss: Literal["softplus", "hinge"] = "softplus"
    r1_weight: float = Field(0.0, ge=0, description="approximate R1 on the noised real sample; not in the paper")
    r1_sigma: float = Field(0.01, gt=0)
    regression_weight: float = Field(0.0, ge=0, description="original DMD; needs pairs")
    regression_loss: Literal["mse", "lpips"] = "mse"  # the original DMD's is LPIPS, which needs vgg_weights
    vgg_weights: WeightsFile | None = Field(None, description="torchvision's VGG-16, the network behind LPIPS")
    guidance_scale: float = Field(1.0, ge=1, description="of the real score")

    num_steps: int = Field(1, gt=0, description="generator steps")
    backward_simulation: bool = True
    share_critic_pass: bool = Field(
        False,
        description="fake score and GAN see the same noised sample: one encoder pass less; not in the paper",
    )
    share_levels: bool = Field(False, description="matching and GAN see the same noised sample; as FastGen")
    turns: Literal["both", "disjoint"] = Field(
        "both", description="whether the critic also moves on a generator step; disjoint as FastGen"
    )
    gan_features: Literal["critic", "teacher"] = Field("critic", description="what the discriminator sees")
    gan_taps: int = Field(1, gt=0, description="encoder levels with a discriminator head, from the coarsest")
    denoising_weighting: Literal["edm", "uniform"] = Field("edm", description="of the fake score's loss over sigma")
    precision: Precision = "fp32"  # the paper trains ImageNet in bf16
    matching_levels: tuple[int, int] = (20, 980)
    critic_levels: tuple[int, int] = (0, 999)
    gan_levels: tuple[int, int] = (0, 999)

    generator_learning_rate: float = Field(2e-6, gt=0)
    critic_learning_rate: float = Field(2e-6, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    warmup_iterations: int = Field(72, ge=0)  # what 500 scheduler steps come to on the paper's 7 GPUs
    grad_clip: float = Field(10.0, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)  # the paper keeps no average
    init_run: str | None = Field(None, description="run whose networks this one starts from, instead of the teacher")

    @property
    def has_gan(self) -> bool:
        """Whether real data and a discriminator take part."""
        return self.gan_generator_weight > 0

    @model_validator(mode="after")
    def _terms_fit_together(self) -> Self:
        if (self.gan_generator_weight > 0) != (self.gan_critic_weight > 0):
            raise ValueError("gan_generator_weight and gan_critic_weight must both be 0 or both be positive")
        if self.matching_weight == 0 and not self.has_gan:
            raise ValueError("matching_weight and gan_generator_weight are both 0: nothing trains the generator")
        if self.share_critic_pass and self.has_gan and self.critic_levels != self.gan_levels:
            raise ValueError("share_critic_pass needs critic_levels and gan_levels to be equal")
        if self.share_levels and self.matching_levels != self.gan_levels:
            raise ValueError("share_levels needs matching_levels and gan_levels to be equal")
        if self.turns == "disjoint" and self.critic_steps_per_generator == 1:
            raise ValueError("turns disjoint needs critic_steps_per_generator above 1, or the critic never moves")
        if self.regression_weight > 0 and self.regression_loss == "lpips" and self.vgg_weights is None:
            raise ValueError("regression_loss lpips needs vgg_weights; name the file, or use mse")
        if self.r1_weight > 0 and not self.has_gan:
            raise ValueError("r1_weight needs a GAN: set gan_generator_weight and gan_critic_weight")
        if self.num_snapshots > self.iterations:
            raise ValueError(f"num_snapshots {self.num_snapshots} exceeds iterations {self.iterations}")
        for name in ("matching_levels", "critic_levels", "gan_levels"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 <= low <= high, got {[low, high]}")
        return self

    def snapshot_steps(self) -> list[int]:
        """The iterations after which the generator is exported, the last one included."""
        return [self.iterations * (i + 1) // self.num_snapshots for i in range(self.num_snapshots)]


class Runtime(Model):
    """What changes how a run is executed but not its result; not part of any digest."""

    log_every: int = Field(50, gt=0, description="iterations between log rows")
    checkpoint_every: int = Field(250, gt=0, description="iterations between checkpoints")
    checkpoint_minutes: float = Field(10.0, gt=0, description="or sooner, after this many minutes")
    keep_checkpoints: int = Field(2, ge=2, description="the newest, and the ones to fall back to")
    sample_batch_size: int = Field(128, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch_size: int | None = Field(
        None, gt=0, description="samples that a device passes at a time; gradients of a batch's parts are summed"
    )
    layout: Literal["replicate", "shard"] = Field(
        "replicate", description="whole networks on every device, or their weights and optimizers in parts (FSDP2)"
    )
    compile: bool = Field(False, description="torch.compile of the networks' blocks; equal up to rounding")
    activation_checkpointing: bool = Field(False, description="recompute the networks' blocks instead of storing them")
    async_checkpoints: bool = Field(True, description="write checkpoints beside the training")
    collective_timeout_minutes: float = Field(10.0, gt=0, description="after which a silent rank ends the job")


class Preset(Model):
    """Data, teacher and scale, with the training defaults of every run on them."""

    name: str
    description: str
    data: Data
    teacher: Teacher
    features: Features
    pairs: Pairs = Pairs()
    samplers: dict[str, Sampler]
    evaluation: Evaluation = Evaluation()
    train: Train
    runs: dict[str, dict[str, Any]] = Field({}, description="adjustments of runs by name, over the run's own keys")
    runtime: Runtime = Runtime()
    gpus: int = Field(0, ge=0, description="devices that a training or teacher-sampling job asks for")

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.pairs.sampler not in self.samplers:
            raise ValueError(f"pairs.sampler: no sampler {self.pairs.sampler!r}; known: {', '.join(self.samplers)}")
        if self.samplers[self.pairs.sampler].kind != "heun" or self.samplers[self.pairs.sampler].s_churn > 0:
            raise ValueError(
                f"pairs.sampler: {self.pairs.sampler!r} is not deterministic; name a heun sampler, s_churn 0"
            )
        self.check(self.train)
        if self.teacher.training is not None:
            self._check_share("teacher.training.batch_size", self.teacher.training.batch_size)
        return self

    def check(self, train: Train) -> None:
        """Raises ValueError where a run asks for more than this preset's teacher has."""
        last = self.teacher.num_levels - 1
        for name in ("matching_levels", "critic_levels", "gan_levels"):
            if (high := getattr(train, name)[1]) > last:
                raise ValueError(f"{name}: {high} is beyond the teacher's last level {last}")
        if train.num_steps > self.teacher.num_levels:
            raise ValueError(f"num_steps {train.num_steps} exceeds the teacher's {self.teacher.num_levels} levels")
        self._check_share("batch_size", train.batch_size)

    def _check_share(self, key: str, batch_size: int) -> None:
        if self.gpus > 1 and batch_size % self.gpus:
            above = -(-batch_size // self.gpus) * self.gpus
            raise ValueError(f"{key} {batch_size} is not divisible by {self.gpus} gpus; use {above}")
        share, micro = batch_size // max(1, self.gpus), self.runtime.micro_batch_size
        if micro is not None and share > micro and share % micro:
            fitting = max(size for size in range(1, micro + 1) if share % size == 0)
            raise ValueError(
                f"{key} {batch_size} on {max(1, self.gpus)} device(s) is {share} samples each, which is not divisible "
                f"by runtime.micro_batch_size {micro}; use runtime.micro_batch_size {fitting}"
            )


class RunFile(Model):
    """The content of `workflow/runs/NAME.yaml` after `extends` was followed."""

    description: str
    train: dict[str, Any] = {}
    weights: WeightsFile | None = Field(None, description="a released student to import instead of training one")


class Run(Model):
    """A run resolved on a preset."""

    name: str
    description: str
    train: Train
    weights: WeightsFile | None = None
