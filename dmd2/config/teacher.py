"""The keys of teachers and of their training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dmd2.config.base import Beta, Model, Precision, Seed, WeightsFile


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
    decay_from: float = Field(
        0.5, ge=0, le=1, description="fraction of the run after which the learning rate decays linearly"
    )
    final_rate: float = Field(0.02, ge=0, le=1, description="final learning rate as a fraction of the initial one")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    p_mean: float = -1.2
    p_std: float = Field(1.2, gt=0)
    grad_clip: float = Field(10.0, gt=0)
    cpu_processes: int = Field(
        1, gt=0, description="processes that share a batch on CPU; fewer use more micro-batches (same bits for 2)"
    )

    @model_validator(mode="after")
    def _processes_divide_the_batch(self) -> Self:
        if self.batch_size % self.cpu_processes:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by cpu_processes {self.cpu_processes}")
        return self

    def micro_batch_size(self, limit: int | None, device: str) -> int | None:
        """The largest micro-batch, in samples, on `device` ("cpu", "cuda"), at most `limit`; None: no limit."""
        if device != "cpu" or self.cpu_processes == 1:
            return limit
        share = self.batch_size // self.cpu_processes
        return min(share, limit or share)


class TeacherConfig(Model):
    """A class-conditional teacher in pixel space: trained here, or loaded from a file."""

    kind: Literal["edm", "mixture"]
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
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


class ComponentsTraining(Model):
    """How the autoencoder and the text encoder of a small text-to-image teacher are trained."""

    seed: Seed = 0
    autoencoder: dict[str, Any] = Field(description="configuration of diffusers' AutoencoderKL")
    autoencoder_iterations: int = Field(gt=0)
    autoencoder_batch_size: int = Field(64, gt=0)
    autoencoder_learning_rate: float = Field(2e-3, gt=0)
    kl_weight: float = Field(1e-4, ge=0)
    text_encoder: dict[str, Any] = Field(description="configuration of transformers' CLIPTextModel")
    text_iterations: int = Field(gt=0)
    text_batch_size: int = Field(64, gt=0)
    text_learning_rate: float = Field(2e-3, gt=0)


class DiffusersTraining(TeacherTraining):
    """How a small text-to-image teacher is trained inside the workflow: uniform levels, the epsilon loss."""

    components: ComponentsTraining
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of captions replaced by the empty one")


class ModelFolder(Model):
    """A model in the layout of diffusers: a folder, or a repository of the hub at a revision."""

    path: str = Field(description="folder, or hub id such as stabilityai/stable-diffusion-xl-base-1.0")
    revision: str | None = Field(None, description="commit of the hub's repository; a folder has none")
    variant: str | None = Field(None, description="variant of the weight files, such as fp16")


Kind = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What a network of diffusers predicts."""


class OwnNetwork(Model):
    """In what an imported network, which a scheduler of diffusers samples from, differs from the preset's teacher."""

    network: dict[str, Any] = Field({}, description="keys over those of `teacher.network`")
    prediction: Kind | None = Field(None, description="none: the teacher's")
    embedded_guidance: float | None = Field(
        None, description="guidance scale embedded as a condition, of a network with time_cond_proj_dim (LCM)"
    )
    time_ids_size: int | None = Field(None, gt=0, description="SDXL's kind: side in its time ids; none: the data's")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # its mapping has no hash


class DiffusersTeacherConfig(Model):
    """A latent text-to-image teacher with a U-Net of diffusers: trained here, or loaded from a folder.

    Its noise levels are x = x0 + sigma * eps with sigma = sqrt((1 - abar) / abar) of its discrete schedule.
    """

    kind: Literal["diffusers"]
    network: dict[str, Any] = Field(description="configuration of diffusers' UNet2DConditionModel, or {like: NAME}")
    prediction: Kind = "epsilon"
    num_levels: int = Field(1000, gt=1)
    beta_start: float = Field(0.00085, gt=0)
    beta_end: float = Field(0.012, gt=0)
    latent_channels: int = Field(4, gt=0)
    latent_factor: int = Field(8, gt=0, description="image pixels per latent, along one side")
    storage: Precision = Field("fp32", description="of the frozen teacher's weights")
    null: Literal["empty", "zeros"] = Field("empty", description="unconditional input: the empty prompt, or zeros")
    min_psnr: float = Field(20.0, gt=0, description="dB; required of decoded latents against their images")
    posterior_seed: Seed = Field(0, description="of the sample of the autoencoder's posterior that is stored")
    training: DiffusersTraining | None = None
    weights: ModelFolder | None = None
    own: OwnNetwork | None = Field(None, description="of an imported run, as its `own`; not of a preset")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # its mappings have no hash

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.training is not None) and (self.weights is not None):
            raise ValueError("set `training` or `weights`, not both")
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        """Network, autoencoder and text encoder that are trained here; defaults are those of the libraries."""
        if self.training is None:
            return self
        autoencoder, text = self.training.components.autoencoder, self.training.components.text_encoder
        factor = 2 ** (len(autoencoder.get("block_out_channels", (64,))) - 1)
        channels, width = autoencoder.get("latent_channels", 4), text.get("hidden_size", 512)
        part = "components.autoencoder"
        wanted = {
            "latent_factor": (self.latent_factor, factor, f"the factor of {part}.block_out_channels"),
            "latent_channels": (self.latent_channels, channels, f"{part}.latent_channels"),
        }
        of_network = {
            "in_channels": (channels, f"{part}.latent_channels"),
            "out_channels": (channels, f"{part}.latent_channels"),
            "cross_attention_dim": (width, "components.text_encoder.hidden_size"),
        }
        for key, (other, name) in of_network.items():
            if key in self.network:  # a job's record may hold no network
                wanted[f"network.{key}"] = (self.network[key], other, name)
        for key, (value, other, name) in wanted.items():
            if value != other:
                raise ValueError(f"{key} is {value}, but {name} is {other}; set one to the other")
        return self


AnyTeacher = Annotated[TeacherConfig | DiffusersTeacherConfig, Field(discriminator="kind")]
"""The multi-step diffusion model that is distilled."""
