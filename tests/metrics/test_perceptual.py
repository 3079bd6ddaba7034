"""LPIPS by the library and the user's VGG-16, against its definition written out."""

from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmd2.config import Evaluation, WeightsFile
from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.metrics.context import Context
from dmd2.metrics.measure import Labelled
from dmd2.metrics.perceptual import load_lpips
from dmd2.metrics.perceptual_diversity import PerceptualDiversity

# torchvision's VGG-16: the place of each convolution in `features`, its channels, and whether a pool comes before it.
CONVOLUTIONS = {
    0: (3, 64, False),
    2: (64, 64, False),
    5: (64, 128, True),
    7: (128, 128, False),
    10: (128, 256, True),
    12: (256, 256, False),
    14: (256, 256, False),
    17: (256, 512, True),
    19: (512, 512, False),
    21: (512, 512, False),
    24: (512, 512, True),
    26: (512, 512, False),
    28: (512, 512, False),
}
TAPPED = (2, 7, 14, 21, 28)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def vgg16(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under torchvision's names; of the classifier, which LPIPS has no use for, one entry."""
    rng = torch.Generator().manual_seed(seed)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for place, (num_in, num_out, _) in CONVOLUTIONS.items():
        weight = torch.randn(num_out, num_in, 3, 3, generator=rng) * (2 / (9 * num_in)) ** 0.5
        bias = 0.1 * torch.randn(num_out, generator=rng)
        state |= {f"features.{place}.weight": weight, f"features.{place}.bias": bias}
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> WeightsFile:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg16(), path, _use_new_zipfile_serialization=False)  # the format of torchvision's file
    return WeightsFile(path=str(path), sha256=sha256(path))


def images(num: int, channels: int, size: int, seed: int) -> Tensor:
    return torch.rand(num, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def features(x: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    found = []
    x = (x - torch.tensor(SHIFT).view(3, 1, 1)) / torch.tensor(SCALE).view(3, 1, 1)
    for place, (_, _, pooled) in CONVOLUTIONS.items():
        x = F.max_pool2d(x, 2) if pooled else x
        x = F.conv2d(x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1).relu()
        if place in TAPPED:
            found.append(x)
    return found


def by_hand(x: Tensor, y: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The distance of each image, brought to 224 x 224."""
    large = [F.interpolate(z.expand(-1, 3, -1, -1), (224, 224), mode="bilinear", align_corners=False) for z in (x, y)]
    return as_they_are(*large, state)


def as_they_are(x: Tensor, y: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Zhang et al., eq. 1: sum_l mean_hw sum_c w_lc (x_lc / |x_l| - y_lc / |y_l|)^2, for each image."""
    linear = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    total = torch.zeros(len(x))
    for level, (one, other) in enumerate(zip(*(features(z, state) for z in (x, y)), strict=True)):
        gap = one / one.square().sum(1, keepdim=True).sqrt() - other / other.square().sum(1, keepdim=True).sqrt()
        total += (linear[f"lin{level}.model.1.weight"][0] * gap.square()).sum(1).mean((1, 2))
    return total


@torch.no_grad()
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_distance_is_the_papers_formula_on_images_brought_to_224(file: WeightsFile, channels: int, size: int):
    x, y = images(2, channels, size, 1), images(2, channels, size, 2)
    truth = by_hand(x, y, vgg16())
    assert float(truth.min()) > 0.01
    torch.testing.assert_close(load_lpips(file)(x, y), truth.mean(), rtol=1e-4, atol=0)


@torch.no_grad()
def test_diversity_of_a_prompt_is_the_formula_on_its_samples_in_their_own_size(file: WeightsFile):
    pixels = np.random.default_rng(0).integers(256, size=(3, 40, 40, 3), dtype=np.uint8)
    samples = Labelled(pixels, np.array(["a prompt", "another", "a prompt"]))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    truth = float(as_they_are(x[:1], x[2:], vgg16()))
    assert truth > 0.01
    evaluation = Evaluation(vgg_weights=file)
    measure = PerceptualDiversity(Context(None, 3, ("edm",), "cpu", evaluation))  # type: ignore[arg-type]
    assert measure.value(samples) == {"lpips_diversity": pytest.approx(truth, rel=1e-4)}


def test_gradient_flows_to_the_images_alone_and_equality_costs_nothing(file: WeightsFile):
    distance = load_lpips(file)
    x, y = images(1, 3, 16, 1).requires_grad_(), images(1, 3, 16, 2).requires_grad_()
    loss = distance(x, y)
    loss.backward()
    assert y.grad is None
    assert x.grad is not None
    assert float(x.grad.norm()) > 0
    with torch.no_grad():
        assert float(distance(x - 1e-2 * x.grad / x.grad.norm(), y)) < float(loss)
        assert float(distance(y, y)) == 0


def test_building_it_downloads_nothing_and_leaves_the_random_numbers_alone(
    file: WeightsFile, monkeypatch: pytest.MonkeyPatch
):
    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("a download was requested")

    monkeypatch.setattr("torch.hub.download_url_to_file", refused)
    before = torch.get_rng_state()
    load_lpips(file)
    assert torch.equal(before, torch.get_rng_state())


def test_a_wrong_file_is_refused_with_its_name(file: WeightsFile, tmp_path: Path):
    def refusal(content: object, **keys: str) -> str:
        path = tmp_path / "wrong.pth"
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError) as error:
            load_lpips(WeightsFile(path=str(path), **keys))
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        return str(error.value)

    good = vgg16()
    assert "no such file (train.vgg_weights.path)" in refusal(None)
    assert "its SHA-256 is" in refusal(good, sha256="0" * 64)
    missing = {name: value for name, value in good.items() if name != "features.28.bias"}
    assert "features.28.bias is missing, expected (512,)" in refusal(missing)
    other = good | {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    assert "features.0.weight is (64, 1, 3, 3), expected (64, 3, 3, 3)" in refusal(other)
    assert "contains a list" in refusal([1, 2])
    assert "not a file of tensors" in refusal(b"not a checkpoint")
    assert "not a file of tensors" in refusal(Path(file.path).read_bytes()[:10_000])
    torch.save(good, tmp_path / "good.pth")
    assert "not a file of tensors" in refusal((tmp_path / "good.pth").read_bytes()[:10_000])


def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path: Path):
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "canary",))  # type: ignore[return-value]

    path = tmp_path / "hostile.pth"
    torch.save({"features.0.weight": Hostile()}, path)
    with pytest.raises(UserError, match="not a file of tensors"):
        load_lpips(WeightsFile(path=str(path)))
    assert not (tmp_path / "canary").exists()
