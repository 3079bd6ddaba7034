"""The keys of a run and of its execution."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dmd2.config.base import WIDEST, Beta, Model, Precision, Seed, WeightsFile


class LoRA(Model):
    """Low-rank adapters in place of the full weights (Hu et al. 2022); defaults of the released SDXL LoRA."""

    rank: int = Field(64, gt=0)
    alpha: float = Field(8.0, gt=0, description="the adapter's scale is alpha / rank")
    targets: tuple[str, ...] = Field(
        (
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
        ),
        min_length=1,
        description="ends of the names of the adapted modules",
    )


class Train(Model):
    """One DMD2 run (paper, algorithm 1; released ImageNet script for the numbers)."""

    seed: Seed = 10
    iterations: int = Field(200_000, gt=0, description="critic updates; the generator is updated every R-th")
    batch_size: int = Field(280, gt=0, description="global, whatever the number of devices")
    num_snapshots: int = Field(20, gt=0, description="evenly spaced exports for the FID-against-training curve")

    critic_steps_per_generator: int = Field(5, gt=0, description="R of the two time-scale update rule")
    matching_weight: float = Field(1.0, ge=0, description="0: only the GAN")
    f_divergence: Literal["js", "kl"] | None = Field(
        None,
        description="the divergence that matching minimises, by weights of samples from the logits of D: js or forward "
        "kl; none: the paper's reverse KL, without weights",
    )
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
    student_levels: tuple[int, ...] | None = Field(
        None, description="noise levels of the steps, descending; default: evenly spaced from the largest"
    )
    generator_lora: LoRA | None = Field(None, description="train adapters of the generator instead of all its weights")
    critic_lora: LoRA | None = Field(None, description="the same for the fake score; not in the paper")
    backward_simulation: bool = True
    share_critic_pass: bool = Field(
        False,
        description="fake score and GAN use the same noised sample, which saves an encoder pass; not in the paper",
    )
    share_levels: bool = Field(False, description="matching and GAN use the same noised sample; as FastGen")
    turns: Literal["both", "disjoint"] = Field(
        "both", description="whether the critic is also updated on a generator step; disjoint as FastGen"
    )
    gan_features: Literal["critic", "teacher"] = Field(
        "critic", description="the network whose features the discriminator uses"
    )
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
    warmup_iterations: int = Field(72, ge=0)  # 500 scheduler steps / the paper's 7 GPUs
    grad_clip: float = Field(10.0, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)  # the paper uses no EMA
    ema_lengths: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="widths of power-function averages that are exported with every snapshot, from which a sampler's "
        "`ema_length` makes any other (EDM2); each costs a copy of the generator",
    )
    sid_alpha: float | None = Field(
        None, gt=0, description="SiD's loss with this alpha in place of the matching gradient (1.2 in its paper)"
    )
    init_run: str | None = Field(None, description="run whose networks initialise this one, instead of the teacher")

    @property
    def has_gan(self) -> bool:
        """Whether the run has a GAN loss, which needs real data."""
        return self.gan_generator_weight > 0

    @property
    def has_critic(self) -> bool:
        """Whether a loss needs the critic; without one the run only regresses on pairs."""
        return self.matching_weight > 0 or self.has_gan

    @model_validator(mode="after")
    def _terms_fit_together(self) -> Self:
        if (self.gan_generator_weight > 0) != (self.gan_critic_weight > 0):
            raise ValueError("gan_generator_weight and gan_critic_weight must both be 0 or both be positive")
        if self.matching_weight == 0 and not self.has_gan and self.regression_weight == 0:
            raise ValueError(
                "matching_weight, gan_generator_weight and regression_weight are all 0: nothing trains the generator"
            )
        if self.share_critic_pass and self.has_gan and self.critic_levels != self.gan_levels:
            raise ValueError("share_critic_pass needs critic_levels and gan_levels to be equal")
        if self.share_levels and self.matching_levels != self.gan_levels:
            raise ValueError("share_levels needs matching_levels and gan_levels to be equal")
        if self.init_run and (self.generator_lora or self.critic_lora):
            raise ValueError("adapters start from the teacher: remove init_run, generator_lora or critic_lora")
        if not self.has_critic and self.num_steps > 1:
            raise ValueError("regression alone trains a one-step generator; set num_steps 1")
        if self.turns == "disjoint" and self.critic_steps_per_generator == 1:
            raise ValueError(
                "turns disjoint needs critic_steps_per_generator above 1, else the critic is never updated"
            )
        if self.regression_weight > 0 and self.regression_loss == "lpips" and self.vgg_weights is None:
            raise ValueError("regression_loss lpips needs vgg_weights; name the file, or use mse")
        if self.f_divergence is not None and not (self.has_gan and self.matching_weight > 0):
            raise ValueError("f_divergence weights the matching loss by the GAN's logits: it needs both terms")
        if self.r1_weight > 0 and not self.has_gan:
            raise ValueError("r1_weight needs a GAN: set gan_generator_weight and gan_critic_weight")
        if self.num_snapshots > self.iterations:
            raise ValueError(f"num_snapshots {self.num_snapshots} exceeds iterations {self.iterations}")
        return self

    @model_validator(mode="after")
    def _levels_are_in_order(self) -> Self:
        for name in ("matching_levels", "critic_levels", "gan_levels"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 <= low <= high, got {[low, high]}")
        if (levels := self.student_levels) is not None:
            if len(levels) != self.num_steps:
                raise ValueError(f"student_levels {list(levels)} must be as many as num_steps, {self.num_steps}")
            if list(levels) != sorted(set(levels), reverse=True) or levels[-1] < 0:
                raise ValueError(f"student_levels {list(levels)} must descend")
        return self

    @model_validator(mode="after")
    def _options_fit_the_terms(self) -> Self:
        if self.sid_alpha is not None and (self.matching_weight == 0 or self.share_levels or self.f_divergence):
            raise ValueError("sid_alpha needs a matching_weight above 0, no share_levels and no f_divergence")
        if (widths := self.ema_lengths) is not None and (list(widths) != sorted(set(widths)) or widths[0] <= 0):
            raise ValueError(f"ema_lengths {list(widths)} must ascend from above 0")
        if self.ema_lengths is not None and self.ema_lengths[-1] >= WIDEST:
            raise ValueError(f"ema_lengths {list(self.ema_lengths)} must be below {WIDEST}, the width of a plain mean")
        return self

    def snapshot_steps(self) -> list[int]:
        """The iterations after which the generator is exported, including the last."""
        return [self.iterations * (i + 1) // self.num_snapshots for i in range(self.num_snapshots)]


class Runtime(Model):
    """Settings of execution that do not change the result; not part of any digest."""

    log_every: int = Field(50, gt=0, description="iterations between log rows")
    checkpoint_every: int = Field(250, gt=0, description="iterations between checkpoints")
    checkpoint_minutes: float = Field(10.0, gt=0, description="maximum minutes between checkpoints")
    keep_checkpoints: int = Field(2, ge=2, description="the newest, and the ones to fall back to")
    sample_batch_size: int = Field(128, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="maximum samples in a micro-batch: a device's share of a batch is split into equal ones",
    )
    layout: Literal["replicate", "shard"] = Field(
        "replicate", description="networks and optimizers replicated on every device, or sharded (FSDP2)"
    )
    deterministic: bool = Field(
        True, description="deterministic CUDA algorithms, so that a resumed run is the same bit for bit"
    )
    compile: bool = Field(False, description="torch.compile of the networks' blocks; equal up to rounding")
    cuda_graphs: bool = Field(
        False,
        description="a student's iterations as CUDA graphs, bit for bit the same; unverified; ignored on the CPU",
    )
    cached_prompts: int = Field(
        0,
        ge=0,
        description="a training computes the embeddings of its prompts once, and drops the text encoders, if there are "
        "at most this many (77 x 2048 numbers each for SDXL); captions of real samples must be among them; equal up to "
        "rounding",
    )
    activation_checkpointing: bool = Field(False, description="recompute the networks' blocks instead of storing them")
    async_checkpoints: bool = Field(True, description="write checkpoints in the background")
    collective_timeout_minutes: float = Field(10.0, gt=0, description="timeout of collective calls, which ends the job")


def largest_part(share: int, at_most: int | None) -> int:
    """The largest divisor of `share` that is at most `at_most`; `share` if that is None."""
    if at_most is None or at_most >= share:
        return share
    return next(size for size in range(at_most, 0, -1) if share % size == 0)
