"""Pictures to tensors: squashed, normalised by CLIP's numbers, cropped and mirrored only where asked."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import hflip

from blip_core.data.augment import RandomAugment
from blip_core.data.transforms import eval_transform, normalise, to_pixels, train_transform


def _gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns * 9, rows * 7, columns * 0 + 90], axis=2).astype(np.uint8))


def test_a_pixel_becomes_a_deviation_from_clip_s_mean() -> None:
    tensor = eval_transform(4)(Image.new("RGB", (4, 4), (255, 0, 127)))
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (127 / 255 - 0.40821073) / 0.27577711]
    assert tensor.shape == (3, 4, 4)
    assert tensor.dtype == torch.float32
    assert torch.allclose(tensor, torch.tensor(expected)[:, None, None].expand(3, 4, 4), atol=1e-6)


def test_evaluation_squashes_the_whole_picture_as_pillow_s_bicubic_does() -> None:
    picture = _gradient(26, 13)
    pixels = np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert np.abs(eval_transform(8)(picture).permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_pixels_normalised_later_and_together_are_the_same_tensors() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 21, 17, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    pixels = [to_pixels(8)(picture) for picture in pictures]
    assert {(tensor.dtype, tensor.shape) for tensor in pixels} == {(torch.uint8, (3, 8, 8))}
    whole = torch.stack([eval_transform(8)(picture) for picture in pictures])
    assert torch.equal(normalise(torch.stack(pixels)), whole)
    assert torch.equal(normalise(pixels[0]), whole[0])


def test_training_without_crop_and_mirror_is_evaluation() -> None:
    picture = _gradient(20, 16)
    assert torch.equal(train_transform(8, 1.0, flip=False)(picture), eval_transform(8)(picture))


def test_mirroring_turns_about_half_of_the_pictures_and_can_be_off() -> None:
    torch.manual_seed(0)
    picture = _gradient(8, 8)
    upright = eval_transform(8)(picture)
    mirrored = hflip(upright)
    seen = [train_transform(8, 1.0, flip=True)(picture) for _ in range(60)]
    turned = sum(torch.equal(tensor, mirrored) for tensor in seen)
    assert turned + sum(torch.equal(tensor, upright) for tensor in seen) == 60
    assert 15 < turned < 45


def test_a_crop_keeps_at_least_its_share_of_the_area() -> None:
    torch.manual_seed(0)
    picture = _gradient(24, 24)
    whole = eval_transform(24)(picture)
    spans = []
    for _ in range(40):
        crop = train_transform(24, 0.5, flip=False)(picture)
        # the gradient's range along each axis says how much of it the crop shows
        width, height = (
            (crop[axis].max() - crop[axis].min()) / (whole[axis].max() - whole[axis].min()) for axis in (0, 1)
        )
        spans.append((width * height).item())
    assert min(spans) > 0.4
    assert min(spans) < 0.8
    assert max(spans) <= 1.1


def test_augmentation_stands_between_the_mirror_and_the_tensor() -> None:
    picture = _gradient(20, 16)
    for seed in range(30):
        torch.manual_seed(seed)
        ours = train_transform(8, 0.5, flip=True, augment=True)(picture)
        torch.manual_seed(seed)
        cropped = v2.RandomResizedCrop(8, (0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC)(picture)
        expected = eval_transform(8)(RandomAugment(2, 5)(v2.RandomHorizontalFlip()(cropped)))
        assert torch.equal(ours, expected)


def test_augmentation_can_be_off() -> None:
    picture = _gradient(20, 16)
    seen = {train_transform(8, 1.0, flip=False, augment=True)(picture).numpy().tobytes() for _ in range(40)}
    assert len(seen) > 5
    assert torch.equal(train_transform(8, 1.0, flip=False, augment=False)(picture), eval_transform(8)(picture))
