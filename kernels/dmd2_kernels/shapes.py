"""The shapes at which DMD2 calls the ops, for ahead-of-time compilation and benchmarks."""

# Sample shapes (C, H, W) of the losses with the paper's batch per GPU: ImageNet-64, SD v1.5 latents, SDXL latents.
LOSSES = {"imagenet": (40, 3, 64, 64), "sd15": (16, 4, 64, 64), "sdxl": (8, 4, 128, 128)}

# Every (channels, side) of the ADM U-Net's norms for ImageNet-64, all with 32 groups, and the number of such layers.
ADM_GROUPS = 32
ADM_LAYERS = {
    (192, 64): 12,
    (384, 64): 4,
    (576, 64): 1,
    (192, 32): 2,
    (384, 32): 11,
    (576, 32): 2,
    (768, 32): 2,
    (960, 32): 1,
    (384, 16): 2,
    (576, 16): 11,
    (768, 16): 1,
    (960, 16): 1,
    (1152, 16): 2,
    (1344, 16): 1,
    (576, 8): 2,
    (768, 8): 14,
    (1344, 8): 1,
    (1536, 8): 3,
}
ADM_NORMS = tuple(ADM_LAYERS)

# Passes through the whole U-Net in an average step with five critic updates per generator update: 0.8 generator
# forwards without a graph, 0.2 each of teacher and critic for the direction; with backward 0.2 of the generator and 1
# of the critic. The GAN's encoder-only passes are not included.
FORWARD_PASSES, FULL_PASSES = 1.2, 1.2
UPDATES = {"matching": 0.2, "denoising": 1.0, "gan-critic": 1.0, "gan-generator": 0.2}

# The GAN heads' GroupNorm+SiLU (batch, channels, side), float32: ImageNet-64 and SDXL.
HEAD_NORMS = {"imagenet-head": (40, 768, 4), "sdxl-head": (8, 1280, 16)}
