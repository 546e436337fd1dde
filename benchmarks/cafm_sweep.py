"""The sweep behind configs/recipes/cafm_digits.json: one change at a time, all from the same starting models.

    python benchmarks/cafm_sweep.py [--jobs 2]

Trains the starting models by train_fm.py if they are not there, runs train_cafm.py for every setting below and writes
benchmarks/cafm_sweep.md.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).parent.parent
WIDE = ROOT / "configs" / "models" / "digits_flow_wide.json"
COMMON = "--report_to none --pretrained_model_name_or_path fm-digits --discriminator_name_or_path fm-digits-wide"
NO_CONTROL = "--control_learning_rates"
SETTINGS = (
    "",
    "--seed 1",
    "--seed 2",
    f"--discriminator_warmup_steps 200 --max_train_steps 1900 {NO_CONTROL}",
    f"--discriminator_warmup_steps 1000 --max_train_steps 2700 {NO_CONTROL}",
    f"--discriminator_warmup_steps 4000 --max_train_steps 5700 {NO_CONTROL}",
    f"--discriminator_warmup_steps auto --discriminator_warmup_signal 0.05 {NO_CONTROL}",
    f"--discriminator_name_or_path fm-digits {NO_CONTROL}",
    f"--discriminator_name_or_path {WIDE} {NO_CONTROL}",
    f"--learning_rate 2e-5 {NO_CONTROL}",
    f"--learning_rate 1e-4 {NO_CONTROL}",
    f"--learning_rate 2e-4 {NO_CONTROL}",
    f"--discriminator_learning_rate 5e-5 {NO_CONTROL}",
)


def run(setting: str, folder: Path) -> dict:
    """The comparison of one run and the last signal that its D saw, or `{}` if it failed."""
    output = folder / (setting.replace(str(ROOT), "").replace("/", "_").replace(" ", "_") or "recipe")
    if not (output / "comparison.json").exists():
        command = [sys.executable, str(ROOT / "train_cafm.py"), "--output_dir", str(output), *COMMON.split()]
        command += ["--overwrite_output_dir"] if output.exists() else []
        with Path(f"{output}.log").open("w") as log:
            subprocess.run([*command, *setting.split()], cwd=folder, env=environment(), stdout=log, stderr=log)
    if not (output / "comparison.json").exists():
        return {}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    signal = [row["visible_signal"] for row in rows if "visible_signal" in row][-1]
    return {**json.loads((output / "comparison.json").read_text()), "signal": signal}


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, one thread each.")
    parser.add_argument("--output_dir", type=Path, default=Path("cafm-sweep"), help="Runs that are there are reused.")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, flags in (("fm-digits", []), ("fm-digits-wide", ["--model_config_name_or_path", str(WIDE)])):
        if not (folder / name / "results.json").exists():
            command = [sys.executable, str(ROOT / "train_fm.py"), "--output_dir", name, "--report_to", "none", *flags]
            command += ["--resume_from_checkpoint", "latest"] if (folder / name).exists() else []
            subprocess.run(command, cwd=folder, env=environment(), check=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda setting: run(setting, folder), SETTINGS))
    lines = [
        "# CAFM on digits: one change at a time",
        "",
        f"Each row is `python train_cafm.py {COMMON} FLAGS`; made by `python benchmarks/cafm_sweep.py`.",
        "The distance is measured in a small classifier's features (5,000 samples of 50 Euler steps without guidance",
        "against the 1,797 digits); lower is better. The control is as much flow matching from the same start, with",
        "the best of three learning rates. s is what D sees at the end.",
        "",
        "| flags | images | start | CAFM | control | class accuracy: start, CAFM, control | s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setting, result in zip(SETTINGS, results):
        name = setting.replace(str(ROOT) + "/", "").removesuffix(NO_CONTROL).strip()
        name = f"`{name}`" if name else "(the recipe)"
        if not result:
            lines.append(f"| {name} | failed | | | | | |")
            continue
        table = result["table"]
        distances = [f"{table[m]['frechet_distance']:.2f}" if m in table else "" for m in ("start", "CAFM", "control")]
        accuracies = ", ".join(f"{row['class_accuracy']:.3f}" for row in table.values())
        cells = [name, f"{result['images']:,}", *distances, accuracies, f"{result['signal']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    (ROOT / "benchmarks" / "cafm_sweep.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
