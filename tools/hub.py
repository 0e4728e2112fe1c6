"""The folder of export.py --format hub: weights, config.json, a model card, and the model's threshold.

The card holds what is known. Paths of this machine are left out. Nothing is uploaded.
"""
import json
import shlex
import tempfile
from pathlib import Path

from faces.files import CHECKPOINT, InputError, atomic_write, load_tensors, read_json, write_json
from faces.training.checkpoint import MAY_DIFFER
from faces.verification.threshold import load_threshold, save_threshold
from faces.verification.weights import model_file
from tools.reproduce import METHODS

PAPERS = {"CosFace": " (arXiv:1801.09414)", "SphereFace": " (arXiv:1704.08063)", "SphereFaceR": " (arXiv:2109.05565)"}
CARD = """---
library_name: pytorch
pipeline_tag: image-feature-extraction
{front}---

# {name}

A face recognition network{paper}. It turns an aligned face into an embedding of 512 values; the
cosine of two embeddings says how alike the faces are. In a clone of *SphereFace and CosFace in PyTorch*:

    python tools/compare.py A.jpg B.jpg --model {folder}    # the same person?
    python tools/embed.py PHOTOS --model {folder} --output faces.npz    # 1,024 values, with the mirrored face's

Elsewhere, `model.safetensors` is the state dict, and `config.json` says how to align a face and prepare the input.
{table}{training}
## Limits

- Faces must be aligned as `config.json` says. Other crops, or BGR, raise no error but give poor embeddings.
- Error rates depend on the photos and differ between groups of people, so measure them on your own photos. A high
  similarity does not prove identity.
"""


def read_figures(file: Path, model: Path, fingerprint: str) -> list[dict]:
    """Return the figures of the network with a fingerprint, a dict per test set, in a results.json of lfw_eval.py or
    the one in a folder; see faces.verification.report.Measured. Raises InputError if there are none."""
    file = file / "results.json" if file.is_dir() else file
    content = read_json(file)
    figures = [row for row in content.get("results", [content])
               if row.get("settings", {}).get("weights", {}).get("fingerprint") == fingerprint and "accuracy" in row]
    if not figures:
        raise InputError(f"there are no figures of {model} in {file}; run `lfw_eval.py --model {model} --lfw DIR "
                         "--output DIR`, and pass that DIR as --results.")
    return figures


def write_folder(args, loaded: dict, weights: bytes, config: dict):
    """Write the new folder args.output, whole or not at all, and print what is unknown. `args` are export.py's,
    `loaded` is what load_net() says of args.model; `weights` and `config` become files."""
    figures = read_figures(args.results, args.model, loaded["fingerprint"]) if args.results else []
    threshold, training = load_threshold(args.model, loaded), describe_training(args.model, loaded)
    if threshold and threshold.source:    # its source is "6,000 pairs of PATH"
        count, _, source = threshold.source.partition(" of ")
        threshold = threshold._replace(source=f"{count} of {Path(source).name}")
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=f".{args.output.name}.") as temporary:
        folder = Path(temporary, "hub")    # with ordinary permissions
        with atomic_write(folder / "model.safetensors") as file:
            file.write(weights)
        write_json(folder / "config.json", config)
        if threshold:
            save_threshold(folder, loaded["fingerprint"], threshold)
        with atomic_write(folder / "README.md", "w") as file:
            file.write(card(args, loaded, figures, training))
        folder.rename(args.output)
    known = {"license": args.license, "datasets": args.dataset, "figures": figures, "threshold": threshold}
    if missing := [name for name, value in {**known, "training": training}.items() if not value]:
        print(f"unknown, so not in the folder: {', '.join(missing)}")


def describe_training(model: Path, loaded: dict) -> str:
    """Return the section of the card about the run: command, size and hardware; empty if the model does not tell."""
    state = load_tensors(model_file(model)) if loaded["format"] == CHECKPOINT else {}
    if not (settings := state.get("settings")):
        return ""
    folder = "cosFace" if state["method"] == "CosFace" else "sphereFace"
    words = ["python", f"{folder}/casia_train.py", "--casia", "DIR"]
    for name, value in settings.items():
        if name not in MAY_DIFFER and value != METHODS[folder].parser.get_default(name):
            words.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
            words += [] if isinstance(value, bool) else ["FILE" if name == "init" else str(value)]
    text = (f"\n## Training\n\n    {shlex.join(words)}\n\n"
            f"- {state['step']:,} steps of {settings['batch_size']} faces; {state['classes']:,} identities\n")
    run = read_json(model_file(model).with_name("settings.json"))
    if run.get("settings") == settings:    # otherwise the file is of another run
        text += f"- hardware{' (after a restart)' if run['from_step'] else ''}: {run['devices']}\n"
    return text


def card(args, loaded: dict, figures: list[dict], training: str) -> str:
    """Return the model card: Markdown after the YAML front matter that model hubs read."""
    name, quote, table = f"{loaded['method'] or 'Sphere CNN'} {loaded['net']}", json.dumps, ""    # JSON is YAML
    front = [f"license: {quote(args.license)}\n"] if args.license else []
    front += [f"datasets: {quote(args.dataset)}\n"] if args.dataset else []
    if figures:
        front += [f"metrics: [accuracy, roc_auc]\nmodel-index:\n- name: {quote(name)}\n  results:\n"]
        table = "\n## Results\n\n| set | pairs | accuracy | 95 % interval | AUC | flip |\n" + "| --- " * 6 + "|\n"
    for row in figures:
        front += ["  - task: {type: image-feature-extraction, name: Face verification}\n"
                  f"    dataset: {{type: {quote(row['set'])}, name: {quote(row['set'])}}}\n    metrics:\n"
                  f"    - {{type: accuracy, value: {row['accuracy']:.5f}}}\n"
                  f"    - {{type: roc_auc, value: {row['auc']:.5f}}}\n"]
        table += "| {set} | {0:,} | {accuracy:.4f} (std {std:.4f}) | {1:.4f} to {2:.4f} | {auc:.4f} | {3} |\n".format(
            row["counts"]["pairs"], *row["interval_95"], row["settings"]["flip"], **row)
    return CARD.format(front="".join(front), name=name, paper=PAPERS.get(loaded["method"], ""), table=table,
                       folder=shlex.quote(args.output.name), training=training)
