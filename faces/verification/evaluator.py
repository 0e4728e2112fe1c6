"""LFW accuracy during training, without effect on it; the set is read once, before the first step."""
import torch

from faces.text import printable
from faces.training.run import unwrap
from faces.verification.evaluate import evaluate
from faces.verification.lfw import load_lfw
from faces.verification.threshold import choose_threshold


class LfwEvaluator:
    """Evaluates a network on LFW in the main process of a training run.

    Args:
        run: faces.training.run.Run.
        lfw: folder of LFW, or a .bin file; None evaluates nothing.
        landmarks: landmark list of LFW, or None.
        find_landmarks: see faces.verification.lfw.load_lfw.
    """

    def __init__(self, run, lfw, landmarks=None, find_landmarks=None):
        self.run, self.lfw, self.name = run, None, printable(str(lfw))
        run.on_main(self._load, lfw, landmarks, find_landmarks)

    def _load(self, lfw, landmarks, find_landmarks):
        if lfw:
            with torch.random.fork_rng(devices=[]):    # making MTCNN's networks draws random numbers
                self.lfw = load_lfw(lfw, landmarks=landmarks, find_landmarks=find_landmarks, device=self.run.device)

    def evaluate(self, net, step, threshold=None):
        """Evaluate the network after `step` steps, in the precision of the training.

        Every process has to call it. The main process evaluates; the others wait.

        Args:
            threshold: of an earlier evaluation, or None.

        Returns:
            ({"lfw": accuracy, "lfw_std": standard deviation over the folds}, threshold with the highest accuracy as
            faces.training.content.THRESHOLD describes it); ({}, `threshold`) without a set and in other processes.
        """
        figures = {}
        if self.lfw is not None:
            result = evaluate(unwrap(net), self.lfw, self.run.device, dtype=self.run.dtype)
            pairs = self.lfw.pairs.judged()
            figures = {"lfw": round(result.accuracy, 5), "lfw_std": round(result.std, 5)}
            best = choose_threshold(result.similarities, pairs.same, f"{len(pairs.same):,} pairs of {self.name}")
            threshold = {**best._asdict(), "step": step}
        self.run.barrier()
        return figures, threshold
