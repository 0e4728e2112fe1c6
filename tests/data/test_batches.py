"""Training batches: every epoch is a new permutation, and augmentation is exact and resumable."""
import numpy as np
import pytest
import torch

from faces.data.batches import Batches, Order, shift_faces
from faces.data.cache import load_casia
from faces.device import to_input


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_epoch_is_a_new_permutation_over_all_processes(world_size):
    steps = list(zip(*(Order(50, 8, 12, rank=rank, world_size=world_size) for rank in range(world_size))))
    epochs = [np.concatenate([np.concatenate(step) for step in steps[e:e + 6]]) for e in (0, 6)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)      # no image repeats, and the last two don't fill a batch
    assert not np.array_equal(*epochs)
    resumed = list(Order(50, 8, 12, start=7, world_size=world_size))
    assert all(np.array_equal(a, b[0]) for a, b in zip(resumed, steps[7:]))


def test_network_input():
    faces = torch.arange(256, dtype=torch.uint8).repeat(2 * 112 * 96 * 3 // 256).reshape(2, 112, 96, 3)
    x = to_input(faces, torch.tensor([False, True]))
    assert x.shape == (2, 3, 112, 96) and x.dtype == torch.float32
    assert x.min() == -127.5 / 128 and x.max() == 127.5 / 128
    assert x[0, 2, 5, 7] == (float(faces[0, 5, 7, 2]) - 127.5) / 128
    assert torch.equal(x[1], to_input(faces)[1].flip(2)) and torch.equal(x[0], to_input(faces)[0])


def test_shifted_faces_repeat_their_border():
    """Compare with a loop over single faces and pixels."""
    faces = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 112, 96, 3), np.uint8))
    shifts = torch.tensor([[0, 0], [2, 0], [0, 2], [-2, 0], [0, -2], [1, -2], [-16, 16]])
    shifted = shift_faces(faces, shifts).numpy()
    for face, (down, right), shifted_face in zip(faces.numpy(), shifts.tolist(), shifted):
        expected = [[face[min(max(y - down, 0), 111), min(max(x - right, 0), 95)] for x in range(96)]
                    for y in range(112)]
        assert np.array_equal(shifted_face, expected)


def test_augmentation_depends_only_on_seed_step_and_rank(casia, tmp_path):
    faces = load_casia(casia, cache=tmp_path)

    def inputs(start, **options):
        options = {"shift": 2, **options}
        return [images for images, _ in Batches(faces, 8, 12, torch.device("cpu"), start, **options)]

    full, resumed, plain = inputs(0), inputs(5), inputs(0, shift=0, flip=False)
    assert len(resumed) == 7 and all(map(torch.equal, full[5:], resumed))
    for other in ({"rank": 1}, {"seed": 1}, {"shift": 0}):
        assert not torch.equal(full[0], inputs(0, **other)[0])
    center = (slice(None), slice(2, -2), slice(2, -2))                     # the pixels that no shift moves out
    seen = set()
    for before, after in zip(torch.cat(plain), torch.cat(full)):           # one shift and flip explains each face
        matches = [(down, right, flip) for flip in (False, True) for down in range(-2, 3) for right in range(-2, 3)
                   if torch.equal((after.flip(2) if flip else after)[center],
                                  before.roll((down, right), (1, 2))[center])]
        assert len(matches) == 1
        seen.add(matches[0])
    downs, rights, flips = map(set, zip(*seen))
    assert downs == rights == {-2, -1, 0, 1, 2} and flips == {False, True}
