"""Training batches: every epoch is a new permutation, and augmentation is exact and resumable."""
import numpy as np
import torch

from faces.data.batches import Batches, order, shift_faces
from faces.data.cache import load_casia
from faces.device import to_input


def test_every_epoch_is_a_new_permutation():
    steps = list(order(50, 8, 12))
    epochs = [np.concatenate([rows for _, rows in steps[e:e + 6]]) for e in (0, 6)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)      # no image repeats, and the last two don't fill a batch
    assert not np.array_equal(*epochs)
    assert all(a == b and np.array_equal(c, d) for (a, c), (b, d) in zip(order(50, 8, 12, start=7), steps[7:]))


def test_network_input():
    faces = torch.arange(256, dtype=torch.uint8).repeat(2 * 112 * 96 * 3 // 256).reshape(2, 112, 96, 3)
    x = to_input(faces, torch.tensor([False, True]))
    assert x.shape == (2, 3, 112, 96) and x.dtype == torch.float32
    assert x.min() == -127.5 / 128 and x.max() == 127.5 / 128
    assert x[0, 2, 5, 7] == (float(faces[0, 5, 7, 2]) - 127.5) / 128
    assert torch.equal(x[1], to_input(faces)[1].flip(2)) and torch.equal(x[0], to_input(faces)[0])


def test_shifted_faces_repeat_their_border():
    """Compare with a loop over single faces and pixels."""
    faces = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 112, 96, 3), np.uint8))
    shifts = torch.tensor([[0, 0], [2, 0], [1, -2], [-16, 16]])
    for face, (down, right), shifted in zip(faces.numpy(), shifts.tolist(), shift_faces(faces, shifts).numpy()):
        expected = [[face[min(max(y - down, 0), 111), min(max(x - right, 0), 95)] for x in range(96)]
                    for y in range(112)]
        assert np.array_equal(shifted, expected)


def test_batches_depend_only_on_seed_step_and_rank(casia, tmp_path):
    faces = load_casia(casia, cache=tmp_path)

    def inputs(start=0, **options):
        options = {"shift": 2, **options}
        return [images for images, _ in Batches(faces, 8, 12, torch.device("cpu"), start, **options)]

    full, resumed, plain, ranks = inputs(), inputs(5), inputs(shift=0, flip=False), [
        inputs(rank=rank, world_size=2) for rank in (0, 1)]
    assert len(resumed) == 7 and all(map(torch.equal, full[5:], resumed))
    assert torch.equal(full[3][::2], ranks[0][3]) and torch.equal(full[3][1::2], ranks[1][3])
    assert not torch.equal(full[0], inputs(seed=1)[0]) and not torch.equal(full[0], inputs(shift=0)[0])
    center = (slice(None), slice(2, -2), slice(2, -2))                     # the pixels that no shift moves out
    seen = set()
    for before, after in zip(torch.cat(plain), torch.cat(full)):           # one shift and flip explains each face
        match, = ((down, right, flip) for flip in (False, True) for down in range(-2, 3) for right in range(-2, 3)
                  if torch.equal((after.flip(2) if flip else after)[center],
                                 before.roll((down, right), (1, 2))[center]))
        seen.add(match)
    downs, rights, flips = map(set, zip(*seen))
    assert downs == rights == {-2, -1, 0, 1, 2} and flips == {False, True}
