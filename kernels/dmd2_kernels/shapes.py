"""The shapes at which DMD2 calls the ops: what is compiled ahead of time and what is measured."""

# Sample shapes (C, H, W) of the losses with the paper's batch per GPU: ImageNet-64, SD v1.5 latents, SDXL latents.
LOSSES = {"imagenet": (40, 3, 64, 64), "sd15": (16, 4, 64, 64), "sdxl": (8, 4, 128, 128)}

# Every (channels, side) at which the ADM U-Net of ImageNet-64 normalises, always in 32 groups.
ADM_GROUPS = 32
ADM_NORMS = (
    *((channels, 64) for channels in (192, 384, 576)),
    *((channels, 32) for channels in (192, 384, 576, 768, 960)),
    *((channels, 16) for channels in (384, 576, 768, 960, 1152, 1344)),
    *((channels, 8) for channels in (576, 768, 1344, 1536)),
)

# The GAN heads' GroupNorm+SiLU (batch, channels, side), float32: ImageNet-64 and SDXL.
HEAD_NORMS = {"imagenet-head": (40, 768, 4), "sdxl-head": (8, 1280, 16)}
