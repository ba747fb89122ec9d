"""Findings of a timing: latency, throughput, speed-up over eager, and the noise of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median, mode
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from exporter import backends, machine, precision
from exporter.artifact import Artifact
from exporter.artifact.disk import user_path
from exporter.artifact.sidecar import Preprocessing
from exporter.bench import (
    Arm,
    Cold,
    Opener,
    Plan,
    Timing,
    batches_of,
    check_devices,
    facts,
    flat,
    supervisor,
    turns,
    worker,
)
from exporter.errors import BadRequest
from exporter.progress import step, track
from exporter.recipe import Bench, MovedWeights, Reference
from exporter.recipe.fields import about
from exporter.report import Finding, Report, judged
from exporter.stats import Center, center

EAGER = "eager"
GPU_WAYS = ("tf32", "fp16", "bf16")
OTHERS = {"eager": "eager", "torch.compile": "compiled", "tf32": "tf32", "fp16": "eager_fp16", "bf16": "eager_bf16"}
"""Ways of running the PyTorch network, and what their metrics are called."""
MOST_TIMES = 10  # --until gives up after so many times the duration
NOISY_PCT = 5.0


class BenchOptions(Bench, frozen=True):
    """Options of `bench`."""

    weights: MovedWeights = None
    reference: Annotated[
        Reference | None,
        about("Time this model instead: module:callable, or timm, transformers or torchvision.", metavar="NAME"),
    ] = None
    eager: Annotated[
        bool, about("Also time the PyTorch model; without it there are no speed-ups, and PyTorch is not needed.")
    ] = True


def bench(artifacts: Sequence[Artifact], options: BenchOptions) -> list[Report]:
    """Time artifacts in turn with the eager model that they were built from; return a report for each.

    Raises: BadRequest for artifacts that cannot be timed together, or not at a batch size.
    """
    _check(artifacts, options)
    _check_devices_here(artifacts, options)
    cache_dir = None if options.cache_dir is None else str(user_path(options.cache_dir))
    if cache_dir is not None:
        _make(Path(cache_dir))
    arms = [*arms_of(artifacts, options), *peaks_of(artifacts, options)]
    gpu = machine.gpu() if _on_gpu(artifacts, options) else None
    timings = [time_batch(arms, artifacts[0], batch, options) for batch in batches_of(options, artifacts)]
    step("loading each model alone, cold")
    alone = [replace(arm, cache_dir=cache_dir) for arm in arms if arm.runtime == "artifact"]
    plan = timings[0].plan
    with turns.alone():
        models = track(alone, len(alone), "models", lambda _: 1)
        cold = {arm.name: supervisor.measure_cold(arm, plan) for arm in models}
    environment = {**backends.environment(), "timing": facts.circumstances(timings)}
    if gpu is not None:
        environment |= {"gpu_before": gpu, "gpu_after": machine.gpu()}
    own = [arm for arm in arms if arm.runtime == "artifact"]
    return [_report(made, arm, timings, cold, environment, options) for made, arm in zip(artifacts, own, strict=True)]


def _make(folder: Path) -> None:
    """Raises: BadRequest where the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"--cache-dir {folder}: cannot be made ({error.strerror}); name another folder") from None


def _check(artifacts: Sequence[Artifact], options: BenchOptions) -> None:
    _check_eager(options)
    first = artifacts[0].sidecar
    for made in artifacts:
        backends.runtime_of(made)
        sidecar = made.sidecar
        if sidecar.weights.digest == first.weights.digest and sidecar.spec != first.spec:
            both = f"returns {sidecar.spec.text}, and {artifacts[0].path} {first.spec.text}"
            raise BadRequest(f"{made.path}: {both}; bench them separately")
        if options.eager and sidecar.weights.digest != first.weights.digest:
            raise BadRequest(
                f"{made.path}: built from other weights than {artifacts[0].path}; models timed together share one "
                "eager model, so bench them separately, or give --no-eager"
            )
        if _pixels(sidecar.preprocessing) != _pixels(first.preprocessing):
            raise BadRequest(f"{made.path}: its input differs from that of {artifacts[0].path}; bench them separately")
    batches_of(options, artifacts)
    check_devices(artifacts, options.device)
    if options.cache_dir is not None:
        for made in artifacts:
            backends.check_cache_dir(backends.runtime_of(made), options.cache_dir, made.path)
    _check_also(artifacts, options)
    names = [made.path for made in artifacts]
    if len(set(names)) < len(names):
        raise BadRequest("the same artifact is named twice; use `compare` to compare an artifact with itself")


def _check_also(artifacts: Sequence[Artifact], options: BenchOptions) -> None:
    for way in set(GPU_WAYS) & set(options.also):
        if not _on_gpu(artifacts, options):
            raise BadRequest(f"--also {way}: PyTorch runs it well on a GPU only; add --device cuda, or leave it out")
    if len(set(options.also)) < len(options.also):
        raise BadRequest("--also: the same way is named twice; leave one of them out")


def _check_eager(options: BenchOptions) -> None:
    """Refuse options about PyTorch where it is not timed."""
    if options.eager:
        return
    if options.also or options.until is not None or options.min_speedup is not None:
        raise BadRequest("--no-eager: --also, --until and --min-speedup are about PyTorch; leave them out")
    if options.weights is not None or options.reference is not None:
        raise BadRequest("--no-eager: --weights and --reference say which PyTorch model is timed; leave them out")


def _check_devices_here(artifacts: Sequence[Artifact], options: BenchOptions) -> None:
    """Refuse a device that this machine does not have, before anything is timed.

    Raises: Unavailable.
    """
    for made in artifacts:
        arm = _arm(str(made.path), made, options)
        if backends.device_kind(made, options.device) != "CPU":
            with worker.open_arm(arm):
                pass


def _pixels(recipe: Preprocessing) -> Preprocessing:
    """The preprocessing without its scaling, which may differ between artifacts that are timed together."""
    return recipe if recipe.input == "image" else recipe.of_network()


def _on_gpu(artifacts: Sequence[Artifact], options: BenchOptions) -> bool:
    """Whether the artifacts run on an NVIDIA GPU; PyTorch is then timed on it too."""
    return backends.device_kind(artifacts[0], options.device) == "NVIDIA GPU"


def arms_of(artifacts: Sequence[Artifact], options: BenchOptions) -> list[Arm]:
    """The arms: eager first, if it is timed, then the artifacts, then those of `--also`."""
    torch: dict[str, Any] = {"device": "cuda" if _on_gpu(artifacts, options) else "cpu"}
    torch["threads"] = options.threads or machine.default_threads()
    torch |= {"weights": options.weights, "reference": options.reference}
    path = str(artifacts[0].path)
    arms = [Arm(name=EAGER, path=path, runtime="eager", **torch)] if options.eager else []
    arms += [_arm(str(made.path), made, options) for made in artifacts]
    return arms + [Arm(name=name, path=path, runtime=name, **torch) for name in options.also]


def peaks_of(artifacts: Sequence[Artifact], options: BenchOptions) -> list[Arm]:
    """The fastest product of each precision and runtime that has one, to measure the peak of the machine."""
    arms = {
        peak_name(made): _arm(peak_name(made), made, options, "peak")
        for made in artifacts
        if backends.runtime_of(made).peak is not None
    }
    return list(arms.values())


def _arm(name: str, made: Artifact, options: BenchOptions, runtime: Literal["artifact", "peak"] = "artifact") -> Arm:
    device = backends.device_of(made, options.device)
    threads = options.threads or machine.default_threads()
    return Arm(name=name, path=str(made.path), runtime=runtime, device=device, threads=threads, hint=options.hint)


def peak_name(made: Artifact) -> str:
    """The name of the product with which an artifact is compared."""
    return f"peak of {made.sidecar.backend} {made.sidecar.precision}"


def time_batch(
    arms: list[Arm],
    made: Artifact,
    batch: int,
    options: BenchOptions,
    opener: Opener = worker.open_arm,
    compared: bool = True,
) -> Timing:
    """Time all arms at one batch size in fresh processes, until the intervals are narrow enough."""
    models, processes = [Path(arm.name).name for arm in arms if arm.runtime != "peak"], supervisor.PROCESSES
    step(f"timing {', '.join(models)} in turn in {processes} fresh processes, batch {batch}")
    plan, until = plan_of(arms, made, batch, options, options.duration / processes, compared), options.until
    timing = Timing(plan)
    if until is None:
        supervisor.measure(timing, opener, processes)
    else:
        supervisor.measure(timing, opener, processes, processes * MOST_TIMES, lambda: _widest(timing) <= until)
    return timing


def plan_of(
    arms: Sequence[Arm], made: Artifact, batch: int, options: BenchOptions, seconds: float, compared: bool = True
) -> Plan:
    """The plan of a timing, with so many seconds in each process."""
    return Plan(
        arms=tuple(arms), preprocessing=made.sidecar.preprocessing, batch=batch, seconds=seconds, seed=options.seed,
        compared=compared,
    )  # fmt: skip


def _widest(timing: Timing) -> float:
    """The widest half-interval of a speed-up, in percent of it."""
    names = [arm.name for arm in timing.standing() if arm.name != EAGER and arm.runtime != "peak"]
    if EAGER in timing.failures or not names:
        return 0.0
    return max(100 * center(speedups(timing, name, EAGER)).half_width for name in names)


def speedups(timing: Timing, name: str, over: str) -> list[float]:
    """The logarithm of the speed-up of an arm in each process, from the blocks of the same rounds."""
    per_launch = []
    for launch in timing.launches:
        if name in launch.blocks and over in launch.blocks:
            pairs = zip(launch.blocks[over], launch.blocks[name], strict=True)
            share = np.log(launch.streams[name] / launch.streams[over])
            per_launch.append(median(float(np.log(median(slow) / median(fast))) for slow, fast in pairs) + float(share))
    return per_launch


def _report(
    made: Artifact,
    arm: Arm,
    timings: list[Timing],
    cold: dict[str, Cold | str],
    environment: dict[str, object],
    options: BenchOptions,
) -> Report:
    findings = [finding for timing in timings for finding in findings_of(timing, arm, made)]
    findings += [*facts.work(made), *facts.cold(cold[arm.name], arm.setting)]
    sessions = [launch.facts[arm.name] for timing in timings for launch in timing.launches if arm.name in launch.facts]
    return Report(
        passed=all(finding.passed for finding in findings),
        recipe={**made.sidecar.recipe, "bench": msgspec.to_builtins(options)},
        artifact=made.to_dict(),
        environment={**environment, "session": sessions[0] if sessions else {}},
        findings=tuple(findings),
    )


def findings_of(timing: Timing, arm: Arm, artifact: Artifact) -> list[Finding]:
    """The findings of one arm of a timing: latency, outputs, share of the peak, and speed-ups over PyTorch."""
    case = f"batch {timing.plan.batch}"
    if arm.name in timing.failures or not any(arm.name in launch.blocks for launch in timing.launches):
        reason = timing.failures.get(arm.name, "was never timed")
        failed = Finding(check="latency", metric="p50_ms", case=case, value=None, passed=False, detail=reason)
        return [msgspec.structs.replace(failed, setting=arm.setting)]
    findings = _latency(timing, arm.name, case)
    if any(other.name == EAGER for other in timing.plan.arms):
        findings.append(_outputs(timing, arm.name, case, artifact))
    findings += _share_of_peak(timing, arm.name, artifact, case)
    findings += facts.parts(timing, arm.name, case)
    for other in timing.plan.arms:
        if other.runtime in OTHERS:
            findings += _against(timing, arm.name, other.name, OTHERS[other.runtime], case)
    return findings


def _latency(timing: Timing, name: str, case: str, prefix: str = "") -> list[Finding]:
    launches = [flat(launch.blocks[name]) for launch in timing.launches if name in launch.blocks]
    samples = [sample for launch in launches for sample in launch]
    streams = next(launch.streams[name] for launch in timing.launches if name in launch.blocks)
    detail = f"{len(samples)} runs in {len(launches)} processes"
    if streams > 1:
        detail += f", {streams} batches at once"
    if not all(launch.settled[name] for launch in timing.launches if name in launch.settled):
        detail += "; it had not settled after the warm-up"
    common: dict[str, Any] = {"check": "latency", "case": case}
    common |= {"noise": noise_of(timing), "setting": timing.setting(name)}
    p50, p90, p99 = (
        Finding(metric=f"{prefix}p{percent}_ms", value=float(np.quantile(samples, percent / 100)), unit="ms", **common)
        for percent in (50, 90, 99)
    )
    rate = 1e3 * timing.plan.batch * streams / float(np.mean(samples))
    return [
        msgspec.structs.replace(
            p50,
            detail=detail,
            samples=tuple(round(sample, 4) for sample in samples),
            launches=tuple(map(len, launches)),
        ),
        p90,
        p99,
        Finding(metric=f"{prefix}throughput_ips", value=rate, unit="images/s", **common),
    ]


def _against(timing: Timing, name: str, other: str, prefix: str, case: str) -> list[Finding]:
    """The latency of another model, and the speed-up over it, in pairs of the same rounds."""
    if other in timing.failures:
        failed = Finding(check="latency", metric=f"{prefix}_p50_ms", case=case, value=None)
        return [msgspec.structs.replace(failed, detail=timing.failures[other], setting=timing.setting(other))]
    ratios = speedups(timing, name, other)
    if len(ratios) < 2:
        return []
    estimate = center(ratios)
    metric = "speedup" if other == EAGER else f"speedup_over_{prefix}"
    speedup = Finding(
        check="latency",
        metric=metric,
        case=case,
        value=float(np.exp(estimate.value)),
        unit="×",
        low=float(np.exp(estimate.low)),
        high=float(np.exp(estimate.high)),
        detail=f"{other} ÷ artifact in pairs, ±{100 * estimate.half_width:.1f} %",
        samples=tuple(round(float(np.exp(ratio)), 5) for ratio in ratios),
        noise=noise_of(timing, estimate),
        setting=timing.setting(name),
    )
    return [speedup, *_latency(timing, other, case, f"{prefix}_")[:1]]


def _share_of_peak(timing: Timing, name: str, made: Artifact, case: str) -> list[Finding]:
    """The share of the speed that the same runtime reaches with its fastest product, timed in turn."""
    macs, peak = made.sidecar.macs, peak_name(made)
    shares = shares_of_peak(timing, name, peak, (macs or 0) * timing.plan.batch)
    if len(shares) < 2:
        return []
    found = center(shares)
    low, value, high = (100 * float(np.exp(end)) for end in (found.low, found.value, found.high))
    rate, product = peak_gflops(timing, peak)
    detail = f"of the {rate:.0f} GFLOP/s of a {product} on {peak.removeprefix('peak of ')}{_computed(timing, peak)}"
    share = Finding(check="latency", metric="peak_pct", case=case, value=value, unit="%", low=low, high=high)
    noise, setting = noise_of(timing, found), timing.setting(name)
    return [msgspec.structs.replace(share, detail=detail, noise=noise, setting=setting)]


def shares_of_peak(timing: Timing, name: str, peak: str, macs: int) -> list[float]:
    """The logarithm of the share of a runtime's peak that an arm of so many multiply-accumulates a run reaches, in each
    process."""
    if not macs:
        return []
    both = [launch for launch in timing.launches if name in launch.blocks and peak in launch.blocks]
    ratios = speedups(timing, name, peak)
    return [
        ratio + float(np.log(macs / int(launch.facts[peak]["macs"])))
        for ratio, launch in zip(ratios, both, strict=True)
    ]


def peak_gflops(timing: Timing, peak: str) -> tuple[float, str]:
    """The speed of a runtime's fastest product in GFLOP/s, and the product that was most often the fastest."""
    launches = [launch for launch in timing.launches if peak in launch.blocks]
    rates = [
        2e-6 * int(launch.facts[peak]["macs"]) * launch.streams[peak] / median(flat(launch.blocks[peak]))
        for launch in launches
    ]
    return median(rates), mode(launch.facts[peak]["product"] for launch in launches)


def _computed(timing: Timing, name: str) -> str:
    """The arithmetic of an arm, if its session reports it."""
    arithmetic = next(
        (launch.facts[name].get("arithmetic") for launch in timing.launches if name in launch.facts), None
    )
    return f", computed in {arithmetic}" if arithmetic else ""


def noise_of(timing: Timing, ratio: Center | None = None) -> str:
    """Sources of noise during the timing, and a wide interval of a ratio, as text, or ""."""
    reasons = [f"interval wider than ±{NOISY_PCT:g} %"] if ratio and 100 * ratio.half_width > NOISY_PCT else []
    reasons += timing.disturbances()
    return f"noisy: {', '.join(reasons)}" if reasons else ""


def _outputs(timing: Timing, name: str, case: str, made: Artifact) -> Finding:
    """The smallest cosine to eager's outputs on the timed inputs, which shows that the timed model is the right one.

    For classes of pixels it is the smallest share of equal ones.
    """
    if EAGER in timing.failures:
        return Finding(check="latency", metric="outputs_cosine", case=case, value=None, detail="eager could not run")
    worst = min(launch.cosine[name] for launch in timing.launches if name in launch.cosine)
    finding = Finding(check="latency", metric="outputs_cosine", case=case, value=worst, detail="on synthetic inputs")
    limits = precision.judged_as(made.sidecar).limits
    of_pixels = {tensor.holds for tensor in made.sidecar.outputs} == {"labels"}
    return judged(finding, limits.pixels.agreement_pct / 100 if of_pixels else limits.cosine, "high")
