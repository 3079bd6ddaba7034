"""A short distillation with every op in its place: the Triton path trains as the reference does."""

import torch
from torch import Tensor, nn

import dmd2_kernels as dk


class Net(nn.Module):
    """A convolution, an adaptive norm with SiLU, a convolution; the pooled features give a logit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 8, 3, padding=1), dk.GroupNormSiLU(8, 2), nn.Conv2d(8, 1, 1)
        self.rows, self.realism = nn.Linear(1, 16), nn.Linear(8, 1)

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.rows(sigma[:, None].log()).chunk(2, dim=1)
        features = self.norm(self.first(x), scale, shift)
        return self.last(features), self.realism(features.mean((2, 3)))


def losses(mode: str, device: str) -> list[float]:
    """The generator's and the critic's loss of four steps."""
    torch.manual_seed(0)
    teacher, critic, generator = (Net().to(device) for _ in range(3))
    generator_steps, critic_steps = (torch.optim.AdamW(net.parameters(), 1e-2) for net in (generator, critic))
    sigma, found = torch.tensor([0.3, 1.0, 5.0], device=device), list[float]()
    head = dk.LinearHead.edm(sigma, 0.5)
    with dk.use(mode):
        for _ in range(4):
            z, data, eps = torch.randn(3, 3, 1, 6, 6).to(device)
            x0, _ = generator(z, sigma)
            x = x0.detach() + sigma[:, None, None, None] * eps
            with torch.no_grad():
                real, fake = teacher(x, sigma)[0], critic(x, sigma)[0]
            matching = dk.matching_loss(x0, real, fake, x=x, head=head)
            loss = matching.loss + 0.1 * dk.gan_generator_loss(critic(x0, sigma)[1]).loss
            generator_steps.zero_grad()
            loss.backward()
            generator_steps.step()
            out, gen_logits = critic(x, sigma)
            denoising = dk.denoising_loss(out, x0.detach(), sigma**-2 + 4, x=x, head=head)
            total = denoising.loss + 0.1 * dk.gan_critic_loss(gen_logits, critic(data, sigma)[1]).loss
            critic_steps.zero_grad()
            total.backward()
            critic_steps.step()
            found += [loss.item(), total.item()]
    return found


def test_four_steps_give_the_losses_of_the_reference(device: str) -> None:
    reference, kernels = (torch.tensor(losses(mode, device)) for mode in ("reference", "triton"))
    assert reference.std() > 0.01
    torch.testing.assert_close(kernels, reference, rtol=1e-4, atol=1e-5)
