"""LFW accuracy while training: the set is read once, before the first step, and measured after each epoch."""
import torch



class LfwProbe:
    """Measures a net on LFW's ten folds, if the command line names an LFW folder. The figures steer nothing.

    Args:
        args: options; lfw and lfw_landmarks are used.
        run: faces.run.Run.
    """

    def __init__(self, args, run):
        self.run, self.lfw = run, None
        if args.lfw and run.first:
            from faces.lfw import load_lfw
            self.lfw = load_lfw(args.lfw, landmarks=args.lfw_landmarks, device=run.device)

    def measure(self, net):
        """Return {"lfw": accuracy, "lfw_std": its deviation over folds}, empty where there is nothing to measure."""
        if self.lfw is None:
            return {}
        from faces.evaluate import evaluate
        result = evaluate(getattr(net, "module", net), self.lfw, self.run.device,
                          dtype=torch.bfloat16 if self.run.bf16 else torch.float32)
        return {"lfw": round(result.accuracy, 5), "lfw_std": round(result.std, 5)}
