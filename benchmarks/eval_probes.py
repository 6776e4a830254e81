"""Classifiers on frozen features: ours against scikit-learn, and all linear probes at once against one at a time.

    python benchmarks/eval_probes.py [--cases logreg,linear,knn] [--threads 1] [--repeats 3] [--json FILE]

CPU time of this process (wall time too, for k-NN), the least of the repeats; `share` is the part of the machine's
matmul peak, measured beside it in the same number type. scikit-learn's tolerance is lowered until its objective is no
further from ours than 1e-6, relative: the time is that of the same answer. Features are made up: clusters that overlap,
with variances along their axes that differ by four orders of magnitude, as those of transformers do.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from vitreg_eval.logistic import Problem, fit_path
from vitreg_eval.probes import MOMENTUM, RATES, Sweep, cosine
from vitreg_eval.tasks.knn import knn_votes

MATMUL = 1024
TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
CLOSE = 1e-6
DIM, LAYERS, CLASSES, BATCH, STEPS = 192, 4, 10, 256, 20


def clusters(count: int, dim: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = 0.15 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    return (centres[labels] + torch.randn(count, dim, generator=generator)) * torch.logspace(1, -1, dim), labels


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Least CPU time of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def peak(dtype: torch.dtype, repeats: int) -> float:
    """Operations of a matrix product per CPU second."""
    left, right = (torch.randn(MATMUL, MATMUL, dtype=dtype) for _ in range(2))
    return 2 * MATMUL**3 / cpu_seconds(lambda: left @ right, 3 * repeats)


def logreg(repeats: int) -> list[dict[str, Any]]:
    """One strength at 6,000 x 192 x 30, at the same objective."""
    x, y = clusters(6000, 192, 30)
    wide, truth = x.double().numpy(), y.numpy()
    rows = []
    for strength in (0.01, 1.0):
        for dtype in (torch.float64, torch.float32):
            fitted = [next(fit_path(Problem(x, y, 30, dtype=dtype), [strength]))]
            ours = cpu_seconds(
                partial(lambda kind, c: next(fit_path(Problem(x, y, 30, dtype=kind), [c])), dtype, strength), repeats
            )
            theirs, tolerance, reached = same_objective(wide, truth, strength, exact(fitted[0], x, y, strength))
            work = (4 * fitted[0].passes + 2) * 6000 * 193 * 30 + 2 * 6000 * 193 * 193
            rows.append(
                {
                    "case": f"logreg C={strength} {str(dtype).removeprefix('torch.')}",
                    "ours_cpu_s": ours,
                    "theirs_cpu_s": theirs,
                    "ratio": theirs / ours,
                    "share": work / ours / peak(dtype, repeats),
                    "about": f"{fitted[0].passes} passes, scikit-learn tol={tolerance}, its objective {reached:+.1e}",
                }
            )
    return rows


def exact(fitted: Any, x: Tensor, y: Tensor, strength: float) -> float:
    """The objective in float64."""
    loss = F.cross_entropy(fitted.scores(x.double()), y, reduction="sum")
    return (strength * loss + fitted.weight.double().square().sum() / 2).item()


def same_objective(wide: Any, truth: Any, strength: float, ours: float) -> tuple[float, float, float]:
    """CPU time of scikit-learn at the first tolerance at which it comes as low, the tolerance, and its excess."""
    for tolerance in TOLERANCES:
        model = LogisticRegression(C=strength, tol=tolerance, max_iter=20_000)
        with warnings.catch_warnings(action="ignore"):
            taken = cpu_seconds(partial(model.fit, wide, truth), 1)
        scores = torch.from_numpy(wide) @ torch.from_numpy(model.coef_).T + torch.from_numpy(model.intercept_)
        loss = F.cross_entropy(scores, torch.from_numpy(truth), reduction="sum")
        excess = (strength * loss.item() + (model.coef_**2).sum() / 2) / ours - 1
        if excess <= CLOSE:
            break
    return taken, tolerance, excess


def linear(repeats: int) -> list[dict[str, Any]]:
    """A step of all 52 probes at once, and the same steps of one layer after the other with torch's SGD."""
    rows = []
    for classes in (CLASSES, 1000):
        x, labels = torch.randn(BATCH, DIM * (LAYERS + 1)), torch.randint(classes, (BATCH,))
        sweep = Sweep(DIM, LAYERS, classes, batch=BATCH, seed=0, device=torch.device("cpu"))
        steps = STEPS if classes == CLASSES else 3

        def together(sweep: Sweep = sweep, x: Tensor = x, labels: Tensor = labels, steps: int = steps) -> None:
            for step in range(steps):
                sweep.step(x, labels, cosine(step, steps))

        def apart(sweep: Sweep = sweep, x: Tensor = x, labels: Tensor = labels, steps: int = steps) -> None:
            for kind in sweep.kinds:
                for rate in RATES:
                    one_probe(sweep, kind, rate, x, labels, steps)

        together()
        ours, theirs = cpu_seconds(together, repeats), cpu_seconds(apart, 1)
        width = sum(weight.numel() for weight in sweep.weights.values())
        share = 4 * BATCH * width * steps / ours / peak(torch.float32, repeats)
        rows.append(
            {
                "case": f"linear 52 probes, {classes} classes",
                "ours_cpu_s": ours,
                "theirs_cpu_s": theirs,
                "ratio": theirs / ours,
                "share": share,
                "about": f"{steps} steps of {BATCH}, features at hand",
            }
        )
    return rows


def one_probe(sweep: Sweep, kind: Any, rate: float, x: Tensor, labels: Tensor, steps: int) -> None:
    """Train one layer as is usual: autograd, torch's SGD and schedule."""
    layer = nn.Linear(sweep.weights[kind].shape[1], sweep.classes)
    optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(layer(sweep.read(x, kind)), labels).backward()
        optimizer.step()
        schedule.step()


def knn(repeats: int) -> list[dict[str, Any]]:
    """1,000 x 50,000 x 384, k up to 200."""
    (train, labels), (test, _) = clusters(50_000, 384, 1000), clusters(1000, 384, 1000, seed=1)

    def ours() -> None:
        knn_votes(train, labels, test, ks=(10, 20, 100, 200), temperature=0.07)

    model = KNeighborsClassifier(200, metric="cosine", algorithm="brute", weights=lambda d: (-d / 0.07).__array__())
    model.fit(train.numpy(), labels.numpy())
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        ours()
        walls.append(time.perf_counter() - start)
    own, theirs = cpu_seconds(ours, repeats), cpu_seconds(lambda: model.kneighbors(test.numpy()), 1)
    share = 2 * 1000 * 50_000 * 384 / own / peak(torch.float32, repeats)
    about = f"{min(walls):.2f} s wall; scikit-learn finds the neighbours of one k alone"
    return [
        {
            "case": "knn 1,000 x 50,000 x 384",
            "ours_cpu_s": own,
            "theirs_cpu_s": theirs,
            "ratio": theirs / own,
            "share": share,
            "about": about,
        }
    ]


CASES = {"logreg": logreg, "linear": linear, "knn": knn}


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.cases.split(","):
        found = CASES[name](options.repeats)
        rows += found
        for row in found:
            print(
                f"{row['case']:34} {row['ours_cpu_s']:8.3f} s cpu, {row['theirs_cpu_s']:8.3f} s theirs or apart, "
                f"{row['ratio']:6.1f}x, {row['share']:4.0%} of peak; {row['about']}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
