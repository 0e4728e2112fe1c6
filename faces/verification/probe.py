"""LFW accuracy during training, for logging only; the set is read once, before the first step."""
from faces.training.run import unwrap
from faces.verification.evaluate import evaluate
from faces.verification.lfw import load_lfw


class LfwEvaluator:
    """Evaluates a network on LFW in the main process of a training run.

    Args:
        run: faces.training.run.Run.
        lfw: folder of LFW, or a .bin file; None evaluates nothing.
        landmarks: landmark list of LFW, or None.
        find_landmarks: see faces.verification.lfw.load_lfw.
    """

    def __init__(self, run, lfw, landmarks=None, find_landmarks=None):
        self.run, self.lfw = run, None
        if lfw:
            run.on_main(self._load, lfw, landmarks, find_landmarks)

    def _load(self, lfw, landmarks, find_landmarks):
        self.lfw = load_lfw(lfw, landmarks=landmarks, find_landmarks=find_landmarks, device=self.run.device)

    def evaluate(self, net):
        """Return {"lfw": accuracy, "lfw_std": standard deviation over the folds}; {} without a set.

        Every process has to call it. The main process evaluates; the others return {} once it is done.
        """
        figures = {}
        if self.lfw is not None:
            result = evaluate(unwrap(net), self.lfw, self.run.device, dtype=self.run.dtype)
            figures = {"lfw": round(result.accuracy, 5), "lfw_std": round(result.std, 5)}
        self.run.meet()
        return figures
