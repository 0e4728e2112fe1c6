"""LFW accuracy during training, for logging only; the set is read once, before the first step."""
import torch

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
        if lfw and run.is_main_process:
            self.lfw = load_lfw(lfw, landmarks=landmarks, find_landmarks=find_landmarks, device=run.device)

    def evaluate(self, net):
        """Return {"lfw": accuracy, "lfw_std": standard deviation over the folds}, or {} if no set was given."""
        if self.lfw is None:
            return {}
        dtype = torch.bfloat16 if self.run.bf16 else torch.float32
        result = evaluate(unwrap(net), self.lfw, self.run.device, dtype=dtype)
        return {"lfw": round(result.accuracy, 5), "lfw_std": round(result.std, 5)}
