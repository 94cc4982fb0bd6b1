"""Do the tests notice? Plant one small defect at a time in a copy of the package and demand that tests fail.

Run it from anywhere, with the environment that runs the tests::

    python tests/mutation.py            # all defects, a few seconds each
    python tests/mutation.py lambda     # those whose description contains the word
    python tests/mutation.py --random 40 --seed 0 --module learning/    # drawn ones, see random_mutation.py

Each defect is one line: the file, its old text (which must occur exactly once), the new text, what it breaks, and the
test files that must notice. Exit status 1 if a defect survives, if an old text is not there, or if the tests could not
run at all. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from random_mutation import Mutant, draw

HANGS = -1  # no exit status of pytest
ROOT = Path(__file__).resolve().parent.parent


class Defect(NamedTuple):
    """One planted defect."""

    what: str
    file: str
    old: str
    new: str
    tests: str


EP = "test_equilibrium"
SURVIVAL = "test_survival"
GRAPH = "test_residual"
RANDOM = "test_random_graphs"
DEFECTS = [
    Defect("drop the 1/2 of 2 beta", "learning/equilibrium.py",
           "self.betas[0] - (self.betas[1] if self.phases == 2 else 0.0)", "self.betas[0]", EP),
    Defect("both phases nudged with +beta", "phases.py",
           "= -beta * weight / divisors", "= -abs(beta) * weight / divisors",
           "test_rest_points test_equilibrium"),
    Defect("nudge away from the target: sign of beta", "phases.py",
           "= -beta * weight / divisors", "= beta * weight / divisors", "test_rest_points"),
    Defect("deviation: plus and minus swapped", "learning/equilibrium.py",
           "first, second = phases if", "second, first = phases if", EP),
    Defect("classical: plus and minus swapped", "learning/equilibrium.py",
           "= -energy.weights[node - 1] / (part.span",
           "= energy.weights[node - 1] / (part.span", EP),
    Defect("pooling: rounding decides between equal units", "ops/pooling.py",
           "least *= -margin", "least *= -0.0", "test_kernels test_micro_batch"),
    Defect("pooling: the last of equal units wins", "ops/conv.cu",
           "? winner.values[i] + 1 : 0;", "? winner.values[i] + 1 : winner.values[i];", "test_cuda_kernels"),
    Defect("pooling: kernels without the margin", "ops/conv.cu",
           "pooled[i] - margin * (size", "pooled[i] - A(0) * (size", "test_cuda_kernels"),
    Defect("top-down columns: a pixel to the right", "ops/conv.cu",
           "x = fx - (kernel - 1 - padding);", "x = fx - (kernel - padding);", "test_cuda_kernels"),
    Defect("average pooling: the adjoint without its share", "ops/conv.cu",
           "narrow<T>(widen(value.values[i]) * share)", "narrow<T>(widen(value.values[i]))", "test_cuda_kernels"),
    Defect("columns: strided windows read their neighbours", "ops/conv.cu",
           "if (x < 0 || x % stride != 0 || x / stride >= width) continue;",
           "if (x < 0 || x / stride >= width) continue;", "test_cuda_kernels"),
    Defect("columns of an image: the next row's pixels in place of padding", "ops/conv.cu",
           "&& 0 <= place && place < line)", "&& 0 <= place)", "test_cuda_kernels"),
    Defect("first edge: what fills up the weight is left as it was", "memory/workspace.py",
           "self.xp.zeros(shape, dtype) for shape, dtype in ops.derived",
           "self.xp.empty(shape, dtype) for shape, dtype in ops.derived", "test_cuda_kernels"),
    Defect("first edge: gradients of earlier steps are added again", "ops/cuda_conv.py",
           "self.factors.product(columns.T, u, self._gradient)",
           "self.factors.add_product(columns.T, u, self._gradient, None)", "test_cuda_kernels"),
    Defect("residual: a warp adds its first partials alone", "ops/update.cu",
           "part += blockDim.x) sum +=", "part += parts) sum +=", "test_cuda_update"),
    Defect("kernels: lambda scales the drive", "ops/update.cu",
           "(SCALE_DRIVE ? feedback * d + t : feedback * t + d)", "(feedback * d + t)", "test_cuda_update"),
    Defect("kernels: increments without the clipped part", "ops/update.cu",
           "clamp(dg + (g - clipped), n.b", "clamp(dg, n.b", "test_cuda_update"),
    Defect("kernels: relaxation forgotten", "ops/update.cu",
           "+ relaxation * (next - widen", "+ (next - widen", "test_cuda_update"),
    Defect("kernels: deviations without 1 / a", "ops/update.cu",
           "increment<A, RULE>(t[i] * inverse,", "increment<A, RULE>(t[i],", "test_cuda_update"),
    Defect("recording stops a phase", "settling.py",
           "if tolerance is not None and asked and per_sample", "if tolerance is not None and measure and per_sample",
           "test_settling"),
    Defect("BPTT is evaluated before its unrolled steps", "learning/bptt.py",
           "return self.network.settle_free(batch, self.settle_free(batch), **unrolled)",
           "return self.settle_free(batch)", "test_learner"),
    Defect("experiments: what a scale uses stands above what all rows share", "experiments/loading.py",
           "{**_used(scale.get(\"use\")), **_options(content.get(\"options\", {})), **_own(scale)}",
           "{**_options(content.get(\"options\", {})), **_options(scale)}", "test_experiments"),
    Defect("experiments: the rows of a scale stand below those of all", "experiments/loading.py",
           "shared.get(key, {}), own.get(key, {}))", "own.get(key, {}), shared.get(key, {}))", "test_experiments"),
    Defect("verdicts: a row that failed has the lowest loss", "experiments/findings.py",
           "FAILED.get(column, value) if", "value if", "test_experiments"),
    Defect("operations of two nudged phases are those of one", "learning/operations.py",
           "products, program = self.pairs if two else self.edges", "products, program = self.edges",
           "test_benchmark"),
    Defect("operations: all steps are counted, though a tolerance ends a phase", "learning/operations.py",
           "if result.nudged else ()", "if False else ()", "test_benchmark"),
    Defect("beta is blamed for a high gain", "training/divergence.py",
           "unrest > UNREST", "unrest < 0", "test_divergence"),
    Defect("a recipe's options may be idle, as those of bp with a beta", "training/config.py",
           "needs=(\"ep\", \"finite\"))", "needs=())", "test_training_config"),
    Defect("files: HDF5 asks for locks that some systems lack", "persistence/hdf5.py",
           "\"r\", locking=LOCKING)", "\"r\", locking=True)", "test_hdf5 test_files"),
    Defect("files: runs started together share a folder", "training/run_directory.py",
           "path.mkdir(parents=True)", "path.mkdir(parents=True, exist_ok=True)", "test_training_files"),
    Defect("files: a byte order mark is text", "files.py",
           "if content.startswith(mark)), \"utf-8\")", "if False), \"utf-8\")", "test_files test_recipes"),
    Defect("files: a tilde is a folder's name", "files.py",
           "Path(path).expanduser() if", "Path(path) if", "test_files test_streams test_cli_wrong"),
    Defect("reproduce: results at the end only", "experiments/runner.py",
           "                    write_json(folder / RESULTS,",
           "                    (lambda *_, **__: None)(folder / RESULTS,",
           "test_experiments"),
    Defect("sweep: a finished run begins again", "experiments/sweep.py",
           "if is_finished(directory):", "if False:", "test_sweep"),
    Defect("compare: accuracies from the lowest", "commands/compare.py",
           "reverse=column in LARGEST_FIRST", "reverse=False", "test_compare"),
    Defect("reductions: the last slab cut off", "ops/reduction.cu",
           "if (channel < channels) {\n            for (int slab = row; slab < slabs;",
           "if (channel < channels) {\n            for (int slab = row; slab < slabs - 1;", "test_reduction"),
    Defect("reductions: bias gradients of parts overwritten", "ops/reduction.cu",
           "if (accumulate) total.load(out);", "", "test_reduction"),
    Defect("reductions: activity with its sign", "ops/reduction.cu",
           "size = x < A(0) ? -x : x;", "size = x;", "test_reduction"),
    Defect("reductions: a channel that diverged is dead", "ops/rows.cuh",
           "else if (other > mine || other != other)", "else if (other > mine)", "test_reduction"),
    Defect("random scheme: always +beta", "learning/equilibrium.py",
           "return [self.beta if self.generator.random() < 0.5 else -self.beta]", "return [self.beta]", EP),
    Defect("deviation: gradient at s* and not at the mean of the phases", "ops/update.py",
           "wide += xp.multiply(total,", "xp.multiply(total,", f"{EP} test_cuda_update"),
    Defect("kernel of mean and difference: the mean at s*", "ops/update.cu",
           "+ share * (x + y)", "", "test_cuda_update"),
    Defect("kernel of mean and difference: the size of one phase", "ops/update.cu",
           "sum += fabs(widen(apart.values[i]))", "sum += fabs(x)", "test_cuda_update"),
    Defect("deviation: mean state without 1 / a_n", "learning/equilibrium.py",
           "else 0.5 / a", "else 0.5", EP),
    Defect("learned maps: both phases count in full", "learning/equilibrium.py",
           "share, scratch = 1 / part.phases,", "share, scratch = 1.0,", EP),
    Defect("classical: winners of the free state in the gradient", "learning/equilibrium.py",
           "work, winners, part.gradients, ops)\n            if not two",
           "work, [None if w is None else network.device.xp.concatenate([w] * part.phases) for w in free.winners], "
           "part.gradients, ops)\n            if not two", EP),
    Defect("classical: stale winners, of the last drives", "energy.py",
           "                edge.drive(nodes[below], work, winners[c], ops[c])\n", "                pass\n", EP),
    Defect("classical: one-sided without the free state's winners", "learning/equilibrium.py",
           "energy.add_gradients(node, free_nodes, work, winners,",
           "energy.add_gradients(node, free_nodes, work, nudged.winners,", EP),
    Defect("response of the scaled deviation", "learning/equilibrium.py",
           "a * part.total / part.samples", "part.total / part.samples", EP),
    Defect("comparison without the truth's norm", "learning/check.py",
           "/ np.linalg.norm(b_unit)", "/ np.linalg.norm(a_unit)", "test_check"),
    Defect("classical: gradients without a_n", "learning/equilibrium.py",
           "= -energy.weights[node - 1] /", "= -1.0 /", EP),
    Defect("deviation: second product of the gradient without lambda", "energy.py",
           ".scaled(self.ratios[c])", ".array", EP),
    Defect("micro-batches: each part counts as a whole batch", "learning/learner.py",
           "self._add(own, part, total, draw)", "self._add(own, part, len(part.images), draw)",
           "test_micro_batch"),
    Defect("micro-batches: activity not weighted", "learning/learner.py",
           "        figures *= share\n", "", "test_micro_batch"),
    Defect("micro-batches: response not weighted", "learning/equilibrium.py",
           "a * part.total / part.samples", "a", "test_micro_batch"),
    Defect("micro-batches: response of states not weighted", "learning/equilibrium.py",
           "xp.stack(response) * (part.samples / part.total)", "xp.stack(response)", "test_micro_batch"),
    Defect("micro-batches: a sign for every part", "learning/learner.py",
           "self._add(own, part, total, draw)", "self._add(own, part, total, self._draw())", "test_micro_batch"),
    Defect("parts: added in the order in which they end", "learning/learner.py",
           "with turns.turn(number):", "if True:", "test_threads"),
    Defect("parts: one takes the gradients of another", "learning/learner.py",
           "self._zero_gradients(number_for(self.network) + 1)", "self._zero_gradients(1)", "test_threads"),
    Defect("parts: all threads have one memory", "network.py",
           "number = number_for(self)", "number = 0", "test_threads"),
    Defect("parts: what another thread derives of the weights is derived again", "memory/workspace.py",
           "ops.derives = is_due(derived_key(n, ops))", "ops.derives = True", "test_threads"),
    Defect("parts: a state put together part by part, not phase by phase", "phases.py",
           "concatenate(by_phase, axis=1)", "concatenate(parts)", "test_threads"),
    Defect("parts: who fails lets others wait", "backend/threads.py",
           "            errors[part] = error\n            turns.fail()\n", "            errors[part] = error\n",
           "test_threads"),
    Defect("parts: Ctrl-C leaves threads at work", "backend/threads.py",
           "while not_done :=", "if not_done :=", "test_threads"),
    Defect("parts: BLAS keeps its threads", "structure.py", "with network.lock, one_blas_thread():",
           "with network.lock:", "test_threads"),
    Defect("memory shared too early: drives that are still to be read", "program.py",
           "if value in _read(self.body[place]) or value in _written(self.body[place]):",
           "if value in _written(self.body[place]):", "test_layout"),
    Defect("memory shared too early: nudged phases over the free state", "network.py",
           "phases, nudges, retain, free.end, **how", "phases, nudges, retain, 0, **how", "test_layout"),
    Defect("memory shared too early: a free phase over its own start", "network.py",
           "replace(shape, base=start.buffers.top)", "shape", "test_layout"),
    Defect("plan: only the longest part of a batch", "memory/plan.py",
           "for length in lengths for rows in", "for length in lengths[-1:] for rows in", "test_plan"),
    Defect("plan: what is taken for a moment forgotten", "memory/plan.py",
           "return max(slopes, last)", "return 0", "test_plan"),
    Defect("plan: one nudged phase and not two", "learning/equilibrium.py",
           'phases = self.network, 2 if self.scheme == "centered" else 1', "phases = self.network, 1", "test_plan"),
    Defect("nudged phases take images as they come", "network.py",
           "batch = self.batch(batch)\n        samples, phases", "samples, phases", "test_replay"),
    Defect("memory: what is released is not forgotten", "memory/layout.py",
           "self._taken = [taken for taken in self._taken if taken[1] <= top]", "pass", "test_depth_one test_plan"),
    Defect("sweeps forget what is carried on", "phases.py",
           'values[Value("kept", n)][part] = values[instruction.keep][part]', "pass", "test_layout"),
    Defect("memory: a sweep begins with drives of the phase before", "phases.py",
           "            buffers.inputs[...] = 0\n", "            pass\n", "test_layout"),
    Defect("memory: states start at those of the batch before", "network.py",
           "            buffers.moving[...] = min(", "            min(", "test_layout"),
    Defect("memory: deviations start at those of the batch before", "phases.py",
           "        buffers.moving[...] = 0\n", "", "test_layout"),
    Defect("memory: gradients added to those of the batch before", "learning/learner.py",
           "        self._gradients[number].packed[...] = 0\n", "", "test_layout"),
    Defect("kappa forgotten in the nudge", "phases.py",
           "= -beta * weight / divisors", "= -beta / divisors", "test_rest_points"),
    Defect("kappa forgotten by mapped signals", "signals.py",
           "Nudge(term, self.kappa, target)", "Nudge(term, 1.0, target)", "test_signals"),
    Defect("own signals: another shape is spread over the state", "signals.py",
           "        if shape != state.shape:\n", "        if False:\n", "test_custom"),
    Defect("own parts: a sign passes", "learning/custom.py",
           "np.abs(a - b).max() <=", "np.abs(abs(a) - abs(b)).max() <=", "test_custom"),
    Defect("own parts: kappa not looked at", "learning/custom.py",
           "abs(weights[1][layer] - 2 * weight) > EXACT", "False", "test_custom"),
    Defect("own parts: an adjoint passes", "learning/custom.py",
           "if abs(upper - lower) > EXACT * size:", "if False:", "test_custom"),
    Defect("own parts: EP and BPTT agree on what is wrong", "learning/check.py",
           "    check_parts(network, signals, batch)\n", "", "test_custom"),
    Defect("identity: feedback forgotten", "persistence/network_file.py",
           '        "feedback": network.feedback,\n', "", "test_identity"),
    Defect("identity: another network passes", "training/snapshot.py",
           "    if found:\n", "    if False:\n", "test_identity"),
    Defect("identity: only the first difference of lists looked for", "persistence/network_file.py",
           'return "" if saved == own else', 'return "" if type(saved) is type(own) else', "test_identity"),
    Defect("biases: a learner makes some up", "energy.py",
           'gradients.get(f"{path}.bias")', 'gradients[f"{path}.bias"]',
           "test_identity"),
    Defect("threads: nobody waits", "structure.py",
           "with network.lock, one_blas_thread():", "with one_blas_thread():", "test_processes"),
    Defect("pickle: a state keeps the address of memory that is no more", "phases.py",
           'return vars(self) | {"buffers": None}', "return vars(self)", "test_processes"),
    Defect("runs: learned maps at the first layer's rate", "training/build.py",
           "layer_of(path), rates[-1])", "layer_of(path), rates[0])", "test_training_build"),
    Defect("runs: rates of layers from the top", "training/build.py",
           "dict(zip(layers, rates, strict=True))", "dict(zip(layers, rates[::-1], strict=True))",
           "test_training_build"),
    Defect("runs: nesterov and momentum forgotten", "training/build.py",
           'shared |= config.take("momentum", "nesterov")', "pass", "test_training_build"),
    Defect("runs: micro-batches forgotten", "training/build.py",
           '**config.take("micro_batch")}', '"micro_batch": None}', "test_training_build"),
    Defect("runs: relaxation forgotten", "training/build.py",
           ', "tolerance", "relaxation")', ', "tolerance")', "test_training_build"),
    Defect("runs: order and signs from one stream", "training/build.py",
           "draws, signs = map(", "signs, draws = map(", "test_training_build"),
    Defect("runs: seed of the signals' maps forgotten", "training/build.py",
           '        "seed": config.seed,\n    }', "    }", "test_training_build"),
    Defect("statistics: a batch counts as much as another", "training/statistics.py",
           'self._add("loss", result.loss * result.count)', 'self._add("loss", result.loss)', "test_training"),
    Defect("statistics: gradient norms not weighted", "training/statistics.py",
           'self._add("gradient_norm", result.gradients.norms() * result.count)',
           'self._add("gradient_norm", result.gradients.norms())', "test_training"),
    Defect("statistics: best layer's residual for the worst's", "training/statistics.py",
           "residual and max(residual)", "residual and min(residual)", "test_training"),
    Defect("statistics: settled samples for unsettled", "training/statistics.py",
           "stats.per_sample > stats.tolerance", "stats.per_sample < stats.tolerance", "test_training"),
    Defect("gradients: norm without the bias", "learning/gradients.py",
           "slice(start, None)).start", "slice(start, None)).stop or start", "test_training test_gradients"),
    Defect("gradients: a run of equal factors scaled up to its last layer", "learning/gradients.py",
           "places[-1].stop]", "places[-1].start]", "test_gradients"),
    Defect("kernels: norms without the last packs of a segment", "ops/reduction.cu",
           "at < stop; at += stride", "at + stride <= stop; at += stride", "test_reduction"),
    Defect("statistics: sums of the epoch start anew on resume", "training/statistics.py",
           "self.count, self.batches = map(int, counts)", "self.count = self.batches = 0",
           "test_training"),
    Defect("checkpoints: numbers that are not finite are taken", "persistence/checkpoint.py",
           "        if not np.isfinite(array).all():\n", "        if False:\n", "test_training_files"),
    Defect("checkpoints: another shape is spread over a parameter", "persistence/checkpoint.py",
           "        if array.shape != parameters[name].shape:\n", "        if False:\n", "test_training_files"),
    Defect("checkpoints: a parameter may be missing", "persistence/checkpoint.py",
           "        if name not in saved:\n", "        if False:\n", "test_training_files"),
    Defect("checkpoints: of any version", "persistence/hdf5.py",
           "if not isinstance(found, np.integer) or found != version:", "if found is None:",
           "test_training_files"),
    Defect("checkpoints: progress below zero", "persistence/checkpoint.py",
           'least = -np.inf if name == "best_accuracy" else 0', "least = -np.inf", "test_training_files"),
    Defect("kappa annealed at the wrong end", "signals.py",
           "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos(", "test_signals"),
    Defect("kappa forgotten for learned maps", "learning/learner.py",
           "share * weight / total", "share / total", "test_signals test_bptt"),
    Defect("lambda forgotten in the deviation's drive", "phases.py",
           "drive, topdown, self.feedback[n - 1], force)",
           "drive, topdown, 1.0, force)", "test_rest_points"),
    Defect("lambda forgotten in the feedback", "ops/update.py",
           "self._total(total, topdown, feedback, drive, force)",
           "self._total(total, topdown, 1.0, drive, force)", "test_rest_points"),
    Defect("a_n forgotten in classical forces", "phases.py",
           "weight / divisors[term.layer - 1]", "weight", "test_rest_points"),
    Defect("a_n forgotten where the deviation's loss is taken", "phases.py",
           "eps, 1 / self.weights[n - 1], g)", "eps, 1.0, g)", "test_rest_points"),
    Defect("deviation: increment at the scaled drive", "ops/update.py", "t *= 1 / weight", "t *= 1",
           "test_rest_points"),
    Defect("residual of the last half of a sweep only", "ops/update.py",
           "residual += row", "residual[...] = row", "test_schedules"),
    Defect("residual halved", "settling.py",
           "return measured if factor == 1 else measured / factor", "return measured / factor / 2",
           "test_schedules test_settling"),
    Defect("convergence judged by the mean", "settling.py",
           "per_sample.max() <= tolerance", "per_sample.mean() <= tolerance", "test_settling"),
    Defect("convergence reported at the last step", "settling.py",
           "    converged = False\n", "    converged = True\n", "test_settling"),
    Defect("stale winners after a warm even/odd start", "program.py",
           "if wanted or any(c in unfound for c in graph.into[node]):", "if wanted:", "test_schedules"),
    Defect("winners of the phase before at a cold even/odd start", "phases.py",
           "            self.winners[connection][...] = 0\n", "            pass\n", "test_schedules"),
    Defect("odd layers before even ones", "graph.py",
           "for colour in range(max(found), -1, -1)]", "for colour in range(max(found) + 1)]", "test_schedules"),
    Defect("a warm sweep goes up first", "program.py",
           "for down in (warm, not warm):", "for down in (False, True):", "test_schedules"),
    Defect("winners forgotten on the way down", "ops/conv.py",
           "max_scatter(s, winners, windows", "max_scatter(s, winners * 0, windows", "test_layers"),
    Defect("deviations read the maximum, not the free winner", "ops/conv.py",
           "max_gather(windows(u, g.pool), winners, result, self._mask[:m])",
           "max_pool(windows(u, g.pool), result, winners.copy(), self._mask[:m])", "test_layers"),
    Defect("padding of the way down off", "ops/conv.py", "g.kernel - 1 - g.padding", "g.padding", "test_layers"),
    Defect("kernel of the way down mirrored on one axis", "ops/conv.py",
           "self.kernel[::-1, ::-1]", "self.kernel[::-1]", "test_layers"),
    Defect("Winograd: a sign of the transposed input transform", "ops/winograd.py",
           "near[1] -= v[3]", "near[1] += v[3]", "test_layers"),
    Defect("Winograd: stale transformed weights", "ops/winograd.py",
           "self._to_u, weight.reshape", "self._to_u, self.__dict__.setdefault('first', weight.copy()).reshape",
           "test_stale_weights"),
    Defect("Winograd: the gradient forgets all chunks but the first", "ops/winograd.py",
           "self._du[a, b] += out", "pass", "test_winograd"),
    Defect("Winograd: what no tile sees keeps what it held", "ops/winograd.py",
           "(slice(last, None),)] = 0", "(slice(last, None),)] += 0", "test_layers"),
    Defect("last chunk takes a sample too few", "ops/conv.py",
           "slice(start, min(start + samples, batch))", "slice(start, min(start + samples, batch - 1))", "test_layers"),
    Defect("dropped rows keep what they held", "ops/pooling.py",
           "if height < u.shape[1]:", "if height > u.shape[1]:", "test_kernels"),
    Defect("average pooling by p", "ops/pooling.py",
           "out *= out.dtype.type(1 / len(units))", "out *= out.dtype.type(1 / len(units) ** 0.5)", "test_kernels"),
    Defect("bias gradient dropped", "layers.py",
           "add_sum(s, bias)  # pooling", "pass  # pooling", "test_layers"),
    Defect("new weights not taken up by the way down", "memory/workspace.py",
           "                workspace.refresh(self._is_due)\n", "                pass\n", "test_stale_weights"),
    Defect("weights of the first step for all steps", "memory/workspace.py",
           "            self._current = outer\n", "            pass\n", "test_stale_weights"),
    Defect("T^2 factor of the loss", "losses.py", "-(self.temperature**2) *", "-self.temperature *", "test_losses"),
    Defect("T factor of the gradient", "losses.py",
           "out *= self.temperature", "out /= self.temperature", "test_losses"),
    Defect("diagnosis: responses not scaled by a_n", "diagnostics/rules.py",
           'return np.asarray(record["nudge_response"]) * np.asarray(weights)',
           'return np.asarray(record["nudge_response"])', "test_diagnostics"),
    Defect("diagnosis: responses compared by their means", "diagnostics/rules.py",
           "np.sqrt(setting.units)", "np.ones(len(setting.units))", "test_diagnostics"),
    Defect("diagnosis: any response of the deviation form lost in rounding", "diagnostics/rules.py",
           'if setting.form != "classical" or not', "if not", "test_diagnostics"),
    Defect("probe: as many steps again, an even number", "diagnostics/probe.py",
           "(max(MORE_STEPS, steps) | 1)", "(max(MORE_STEPS, steps) & ~1)", "test_probe"),
    Defect("probe: distance against the own state only", "diagnostics/probe.py",
           "np.maximum(_rms(a), _rms(b))", "_rms(b)", "test_probe"),
    Defect("probe draws the sign of the random scheme", "diagnostics/probe.py",
           '[learner.beta] if learner.scheme == "random" else learner.betas()', "learner.betas()", "test_probe"),
    Defect("checkup with the kappa of the last batch seen", "training/trainer.py",
           "self.schedules.set(epoch - 1, self.epochs)  # kappa as recorded, wherever the epoch was taken up",
           "pass", "test_survival"),
    Defect("saturated at the lower end only", "ops/reduction.py",
           "xp.greater_equal(scratch, top", "xp.less_equal(scratch, top", "test_learner"),
    Defect("dead units instead of dead channels", "ops/reduction.py",
           ".max(axis=0) <= dead", ".min(axis=0) <= dead", "test_learner"),
    Defect("confusion matrix transposed", "commands/confusion.py",
           "np.add.at(matrix, (batch.labels, scores.argmax(axis=1)), 1)",
           "np.add.at(matrix, (scores.argmax(axis=1), batch.labels), 1)", "test_plots"),
    Defect("map of the layers upside down", "commands/plots/maps.py", 'origin="lower"', 'origin="upper"', "test_plots"),
    Defect("events of an older session stay", "training/tensorboard.py", ", purge_step=1)", ")", "test_tensorboard"),
    Defect("diagnosis without the signals of the run", "commands/diagnose.py",
           "build_learner(config, network, signals,", "build_learner(config, network, [],", "test_diagnose"),
    Defect("one-hot of the next class", "batch.py",
           "labels[:, None] == device", "labels[:, None] == 1 + device", "test_losses"),
    Defect("clip increment as a plain difference", "activations.py",
           "        dg += bound\n", "        dg += bound + clipped\n        dg -= clipped\n",
           "test_activations test_equilibrium"),
    Defect("slope of a clip outside its range", "activations.py",
           "inside &= part < self.high / self.gain", "inside |= part < self.high / self.gain", "test_activations"),
    Defect("energy: feedback weighted by the layer below", "energy.py",
           "self.weights[above - 1] * topdown", "self.weights[below - 1] * topdown", "test_energy"),
    Defect("BPTT forgets lambda on the way up", "energy.py",
           "multiply(q, self.ratios[connection], out=scaled)", "multiply(q, 1.0, out=scaled)", "test_bptt"),
    Defect("BPTT forgets the way up", "learning/bptt.py",
           "            here += self._up(", "            self._up(", "test_bptt"),
    Defect("adjoint at an equilibrium forgets the way up", "learning/bptt.py",
           "                change += self._up(", "                self._up(", "test_bptt"),
    Defect("adjoint at an equilibrium ends too early", "learning/bptt.py",
           "ADJOINT_TOLERANCE = 1e-5", "ADJOINT_TOLERANCE = 1e-1", "test_bptt"),
    Defect("halves compared while they flicker", "learning/check.py",
           "own.settle(flickering, **rest)", "flickering", "test_check"),
    Defect("precisions compared from a free state of another network", "learning/check.py",
           '(own.estimate(found, **settings), single.estimate(beside, **settings))',
           '(own.estimate(found, **settings), single.estimate(free, **settings))', "test_check"),
    Defect("a precision that never holds the free state of float32", "learning/check.py",
           "own.settle(free, **rest), own", "own.settle(None, **how), own", "test_check"),
    Defect("comparison with truncated BPTT", "learning/check.py",
           "    if steps is not None:\n        return learner", "    if True:\n        return learner", "test_check"),
    Defect("BPTT sums over the batch", "learning/bptt.py", "1 / (scale * total)", "1 / scale", "test_bptt"),
    Defect("backpropagation forgets the slope", "learning/backprop.py",
           "            here *= slope\n", "", "test_backprop"),
    Defect("teacher's view ignored by the signal", "signals.py",
           "self._checked(teacher.logits(split, batch.index, batch.view))",
           "self._checked(teacher.logits(split, batch.index, 0 * batch.view))", "test_signals"),
    Defect("teacher's view ignored by the table on the device", "signals.py",
           "teacher.places(split, batch.index, batch.view)", "teacher.places(split, batch.index, 0 * batch.view)",
           "test_resident"),
    Defect("teacher's table: mirrored rows of the first view", "data/teacher.py",
           "self._place_of_view(int(code)) * self._file[name].shape[1]", "0", "test_teacher test_resident"),
    Defect("labels of the device outlive those of the host", "batch.py",
           "field(default=None, init=False, repr=False)", "field(default=None, repr=False)",
           "test_resident"),
    Defect("teacher's view ignored by the file", "data/teacher.py",
           "places = self.table(split_name), self.places(split_name, index, view)",
           "places = self.table(split_name), self.places(split_name, index, 0 * view)", "test_teacher"),
    Defect("momentum of the wrong sign", "ops/optimizer.py",
           "velocity += total", "velocity -= total", "test_optim"),
    Defect("weight decay away from zero", "ops/optimizer.py",
           "multiply(parameter, decay, out=out)", "multiply(parameter, -decay, out=out)", "test_optim"),
    Defect("kernel of SGD: Nesterov's form always", "ops/optimizer.cu",
           "(nesterov ? total + momentum", "(true ? total + momentum", "test_cuda_optimizer"),
    Defect("kernel of Adam: weight decay forgotten in the square", "ops/optimizer.cu",
           "complement2 * (total * total)", "complement2 * (g.values[i] * g.values[i])", "test_cuda_optimizer"),
    Defect("standardized: no 1 / sqrt(fan_in)", "weights.py",
           "share = 1 / math.sqrt(", "share = 1 + 0 * math.sqrt(", "test_weights"),
    Defect("standardized: statistics of another weight", "weights.py",
           "if self._of != identity(v):\n            raise", "if self._of is None:\n            raise",
           "test_weights"),
    Defect("standardized: the optimizer's weight overwritten", "weights.py",
           "if identity(w) == self._of:", "if w is self._of:", "test_weights"),
    Defect("standardized: no epsilon", "ops/standardize.py",
           "inverse += epsilon", "inverse += 0.0", "test_weights"),
    Defect("standardized: the gradient through the mean forgotten", "ops/standardize.py",
           "here -= total", "here -= 0.0", "test_weights"),
    Defect("standardized: the gradient through the variance forgotten", "ops/standardize.py",
           "d *= dot\n", "d *= 0.0\n", "test_weights"),
    Defect("standardized: the gradient through the variance without epsilon's share", "ops/standardize.py",
           "        dot *= inverse\n        dot /= rows\n",
           "        dot /= xp.sum((v - mean) ** 2, axis=0) * inverse\n",
           "test_weights"),
    Defect("standardized: only the last piece of rows counts", "ops/standardize.py",
           "mean += xp.sum(v[part], axis=0, out=row)", "mean[...] = xp.sum(v[part], axis=0, out=row)", "test_weights"),
    Defect("kernel of standardized weights: no gradient through the mean", "ops/standardize.cu",
           "gradient.values[i] - total[i] - d * dot[i]", "gradient.values[i] - d * dot[i]", "test_weights"),
    Defect("kernel of standardized weights: gradient of the gain without 1 / sqrt(fan_in)", "ops/standardize.cu",
           "gradient.values[i] = factor * dot[i];", "gradient.values[i] = dot[i];", "test_weights"),
    Defect("kernel of standardized weights: sums for the threads of the first row only", "ops/rows.cuh",
           "shared[i * BLOCK + thread % lanes];", "shared[i * BLOCK + thread];", "test_weights"),
    Defect("LSUV: scaled by the variance", "initialization.py",
           "scale(name, 1 / deviation)", "scale(name, 1 / deviation**2)", "test_initialization"),
    Defect("LSUV: the last factor for that of all", "initialization.py",
           "factor /= deviation", "factor = 1 / deviation", "test_initialization"),
    Defect("AdamW: no decay", "optim.py",
           '{"decay": 0.0, "shrink": shrink}', '{"decay": 0.0, "shrink": 1.0}', "test_optim"),
    Defect("AdamW: decay by the corrected rate", "ops/optimizer.py", "parameter *= shrink", "parameter *= shrink**2",
           "test_optim"),
    Defect("kernel of Adam: shrinks nothing", "ops/optimizer.cu",
           "= shrink * p.values[i] - rate", "= p.values[i] - rate", "test_cuda_optimizer"),
    Defect("clip by the norm of all units", "ops/optimizer.py",
           "most, length = xp.sqrt(squares, out=squares)",
           "most, length = xp.sqrt(squares, out=squares)\n    length[...] = length.max()", "test_optim"),
    Defect("clip of the readout", "optim.py", '("readout.", "signals.")', '("signals.",)', "test_optim"),
    Defect("gradient norms recorded after the clip", "training/trainer.py",
           "self.statistics.add(result)  # before a clip\n        self.optimizer.step(result.gradients, factor)",
           "self.optimizer.step(result.gradients, factor)\n        self.statistics.add(result)", "test_training"),
    Defect("warm-up of kappa", "training/schedules.py",
           "signal.anneal(progress)", "signal.anneal(min(progress, self.warmup))", "test_training"),
    Defect("warm-up begins at nothing", "training/schedules.py",
           "(done + self.step) / self.warmup", "done / self.warmup", "test_training"),
    Defect("patience counts epochs of the run", "training/trainer.py",
           "self.epochs_done - self.best_epoch >= self.patience", "self.epochs_done > self.patience", "test_training"),
    Defect("smoothed labels do not sum to 1", "batch.py",
           "rows *= 1 - self.label_smoothing", "rows *= 1", "test_resident"),
    Defect("test labels smoothed, too", "training/build.py",
           "return Loader(dataset, split, config.batch_size, network.device, network.dtype)",
           "return Loader(dataset, split, config.batch_size, network.device, network.dtype, "
           "label_smoothing=config.label_smoothing)", "test_training"),
    Defect("the average keeps its start", "optim.py",
           "min(self.ema, (1 + self.steps) / (10 + self.steps))", "self.ema", "test_optim"),
    Defect("the average stays in the parameters' place", "optim.py",
           "        finally:\n            self._swap()", "        finally:\n            pass", "test_optim"),
    Defect("kernel of the average: the way back", "ops/optimizer.cu",
           "share * (p.values[i] - a.values[i])", "share * (a.values[i] - p.values[i])", "test_cuda_optimizer"),
    Defect("parameters used in the place of their average", "persistence/checkpoint.py",
           'self.optimizer.get(f"average.{path}", array)', "array", "test_training"),
    Defect("trained parameters judged, not their average", "training/trainer.py",
           "with self.optimizer.averaged():", "with np.errstate():", "test_training"),
    Defect("a hidden square from its centre on", "data/loader.py",
           "return centres - self.cutout // 2", "return centres", "test_data_loader"),
    Defect("hidden squares drawn before the crops", "data/loader.py",
           "        order = rng.permutation(count) if self.shuffle else np.arange(count)\n",
           "        self.cutout and self._squares(count)\n"
           "        order = rng.permutation(count) if self.shuffle else np.arange(count)\n", "test_data_loader"),
    Defect("Adam: the mean is not corrected", "optim.py",
           "rate / (1.0 - self.betas[0] ** self.steps), 1.0", "rate, 1.0", "test_optim"),
    Defect("a piece of a parameter is updated twice", "ops/optimizer.py",
           "slice(start, start + rows)", "slice(start, start + rows + 1)", "test_optim"),
    Defect("gate: images of the energy are not looked at", "energy.py",
           "input_shape, self.dtype)", "input_shape, self.dtype, values=False)", "test_gate"),
    Defect("gate: images that halves cannot hold become infinite", "batch.py",
           "kept = x.astype(stored, copy=False) if", "kept = x if", "test_gate"),
    Defect("gate: booleans are taken for integers", "errors.py",
           "isinstance(value, numbers.Integral) and not isinstance(value, bool)", "isinstance(value, numbers.Integral)",
           "test_signatures"),
    Defect("mirrored view not reported to the teacher", "data/loader.py",
           "draws.flip[rows].astype", "0 * draws.flip[rows].astype", "test_data_loader"),
    Defect("batch index counted from the batch", "data/loader.py",
           "self.split.index[draws.order[rows]]", "np.arange(len(draws.order[rows]))", "test_data_loader"),
    Defect("exported kernels with rows and columns swapped", "export/weights.py",
           "weight.transpose(3, 2, 0, 1)", "weight.transpose(3, 2, 1, 0)", "test_export"),
    Defect("exported dense weights in the wrong flattening order", "export/weights.py",
           "weight.reshape(*below, -1).transpose(2, 0, 1, 3)", "weight.reshape(*below, -1).transpose(2, 1, 0, 3)",
           "test_export"),
    Defect("exported graph: the readout sees the map and not its averages", "export/onnx_graph.py",
           "if readout.pool:", "if False:", "test_export"),
    Defect("exported graph without lambda", "export/onnx_graph.py",
           "if down is None or ratio == 1 else self.node", "if True else self.node", "test_export test_residual_runs"),
    Defect("exported graph: winners of the first step for all steps", "export/onnx_graph.py",
           "pooled, self.winners[c] = self.node(\"MaxPool\", u, outputs=2, **pool)",
           "pooled, fresh = self.node(\"MaxPool\", u, outputs=2, **pool)\n        "
           "self.winners[c] = self.winners[c] or fresh", "test_export"),
    Defect("settled judged by the mean of the layers", "commands/predict.py",
           "state.stats.per_sample.max(axis=0)", "state.stats.per_sample.mean(axis=0)", "test_trained"),
    Defect("pictures normalised without the mean", "data/loader.py",
           "images += self._shift", "images += 0 * self._shift", "test_data_loader test_data_selection"),
    Defect("pictures cut, not their middle square", "data/pictures.py",
           "square = ImageOps.fit(picture, (native, native), Image.Resampling.BOX)",
           "square = picture.resize((native, native), Image.Resampling.BOX)", "test_pictures"),
    Defect("saved network forgets the feedback weight", "persistence/network_file.py",
           '"feedback": network.feedback', '"feedback": 1.0', "test_network_file"),
    Defect("canonical index forgotten for chosen samples", "data/loader.py",
           "self.split.index[draws.order[rows]]", "draws.order[rows].astype(np.int64)", "test_data_selection"),
    Defect("validation samples in training", "data/dataset.py",
           "return self.select(rest), self.select(rows,", "return self, self.select(rows,", "test_data_selection"),
    Defect("best epoch chosen on the test images in spite of validation", "training/trainer.py",
           'record[f"{self.best_split}_accuracy"]', 'record["test_accuracy"]', "test_training"),
    Defect("limits take the first samples, not those of each class", "data/selection.py",
           'order[np.argsort(turn[order], kind="stable")[:count]]', "order[:count]", "test_data_selection"),
    Defect("teacher rows taken for sample numbers", "data/teacher.py",
           "rows = np.searchsorted(known, index).clip(0, count - 1)", "rows = index.clip(0, count - 1)",
           "test_data_selection"),
    Defect("whatever images lie there are the data set", "data/dataset.py",
           "    check_original(source, arrays, layout.place)\n", "", "test_data_verify"),
    Defect("data: any pickle is opened", "data/formats.py",
           "check_sum(content, source.sums[Path(where).name], where, remedy)", "pass", "test_pickles"),
    Defect("data: a pickle finds whatever it names", "data/formats.py",
           "raise DataError(f\"a pickle asks", "return super().find_class(module, name) or (f\"a pickle asks",
           "test_pickles"),
    Defect("data: any MATLAB file is opened", "data/formats.py",
           "check_sum(content, source.sums[plain_name(path)], path, remedy)", "pass", "test_svhn"),
    Defect("teacher's accuracy counted from whatever view comes last", "data/teacher_writer.py",
           'if view_name == "identity":', "if True:", "test_teacher"),
    Defect("a teacher is believed what it says of itself", "data/teacher.py",
           "abs(stored - found) <= ROUNDING,", "True,", "test_teacher_survival"),
    Defect("a mirrored view in another order is not seen", "data/teacher.py",
           "right += (values.argmax(axis=2) == labels[rows]).sum(axis=1)",
           "right += (values[0].argmax(axis=1) == labels[rows]).sum()", "test_teacher_survival"),
    Defect("a run goes on with any teacher", "training/runs.py",
           "if kept := kept_teacher(run, [other]):", "if kept := None:", "test_teacher_survival"),
    Defect("any file is the teacher that a run started with", "training/teacher.py",
           '.split(" ")[0] == _checksum(path)', '.split(" ")[0] != ""', "test_teacher_survival"),
    Defect("graph reused for another free state", "phases.py",
           "return [*super()._arrays(), *self.winners, *self.rest]", "return super()._arrays()", "test_replay"),
    Defect("graph reused for other states", "memory/layout.py",
           "groups = (self.states, self.drives or [],", "groups = (self.drives or [],", "test_replay"),
    Defect("graph reused after the weights were exchanged", "layers.py",
           "return (identity(self.weight), identity(self.bias)) if", "return () if", "test_replay"),
    Defect("scaled deviations: force without the scale", "phases.py",
           "divisors = [1 / self.scale] * len", "divisors = [1.0] * len", "test_halves"),
    Defect("scaled deviations: gradient with the scale", "learning/equilibrium.py",
           "part.total * nudged.scales[-1])", "part.total)", "test_halves"),
    Defect("scaled deviations: residual with the scale", "settling.py",
           "phase.scale * phase.relaxation", "phase.relaxation",
           "test_halves"),
    Defect("scaled adjoint states: gradient with the scale", "learning/backprop.py",
           "1 / (scale * total)", "1 / total", "test_halves"),
    Defect("losses see states in halves", "phases.py",
           "self.precision.number if dtype is None else dtype)\n        seen",
           "self.precision.stored if dtype is None else dtype)\n        seen", "test_halves"),
    Defect("a loss overwrites the force of the one before", "phases.py",
           "add=number > 0", "add=False", "test_layout test_rest_points"),
    Defect("a head's rounded map is that of the first phase", "heads.py",
           "        self._factors.take_up(self.weight,", "            self._factors.take_up(self.weight,",
           "test_halves"),
    Defect("errors overflow in float16", "heads.py", "UP = 64.0", "UP = 1.0", "test_halves"),
    Defect("a head of one's own is passed over", "heads.py",
           "if not self.identity and type(self).add_force is Head.add_force:", "if not self.identity:", "test_halves"),
    Defect("what a loss sees: pooled over the rest point, not all phases", "ops/update.py",
           "2 * size if len(out) > step else 0", "0", "test_cuda_update"),
    Defect("kernel of what a loss sees: deviations not scaled", "ops/update.cu",
           "numbers) + scale * change", "numbers) + change", "test_cuda_update"),
    Defect("kernel of what a loss sees: one phase only", "ops/update.cu",
           "row < rows; row += gridDim.z", "row < gridDim.z; row += gridDim.z", "test_cuda_update"),
    Defect("kernel of spreading: written, not added", "ops/head.cu",
           "if (ADD) sum.load(force);", "", "test_cuda_head"),
    Defect("kernel of the error: the map's factor forgotten", "ops/head.cu",
           "const A factor = down * scale[blockIdx.x];", "const A factor = scale[blockIdx.x];", "test_cuda_head"),
    Defect("weights not rounded before a product", "ops/factors.py",
           "numbers[part].astype(self.precision.stored)", "numbers[part]", "test_precision"),
    Defect("TF32: ties away from even", "ops/factors.py", "half += 0xFFF", "half += 0x1000", "test_precision"),
    Defect("sums of a bias gradient in halves", "ops/reduction.py",
           ".sum(axis=0, dtype=out.dtype)", ".sum(axis=0)", "test_precision"),
    Defect("graph reused with another feedback", "phases.py",
           "factors = (*self.feedback, *self.shares, *self.weights)", "factors = ()",
           "test_replay"),
    Defect("graph reused with another temperature", "heads.py",
           "(self.criterion.name, self.criterion.temperature,", "(self.criterion.name,", "test_replay test_heads"),
    Defect("graph of an iteration that is not measured reused for one that is", "settling.py",
           "phase.repeat((measure, relaxation), ", "phase.repeat((relaxation,), ", "test_replay"),
    Defect("a user's own edge captured", "layers.py",
           "if type(self) in (Conv2d, Linear) else None", "if True else None", "test_replay"),
    Defect("captured, and taken for done", "backend/graphs.py",
           "        if graph is None:\n            work()\n        else:\n            graph.launch()",
           "            return\n        graph.launch()", "test_graphs"),
    Defect("captured before it was ever done", "backend/graphs.py",
           "        if name not in self.graphs:\n            work()\n", "        if name not in self.graphs:\n",
           "test_graphs"),
    Defect("a broken capture left open", "backend/graphs.py",
           "                        stream.end_capture()\n                    raise", "                        pass\n"
           "                    raise", "test_graphs"),
    Defect("residual of a replay added to the last", "settling.py",
           "        phase.residual[...] = 0\n", "        pass\n", "test_settling test_replay"),
    Defect("force of a head written, not added", "ops/head.cu",
           "sum.values[i] += share.values[i]", "sum.values[i] = share.values[i]", "test_cuda_head"),
    Defect("targets of the first phase alone", "phases.py",
           "out.reshape(self.phases, *array.shape)[...] = array", "out[: len(array)] = array", "test_rest_points"),
    Defect("weight gradient overwritten by each chunk", "backend/device.py",
           "gemm(a, b, out, accumulate=True, tf32=tf32)", "gemm(a, b, out, tf32=tf32)", "test_cupy_host"),
    Defect("survival: place in the epoch forgotten", "training/trainer.py",
           "self.train.batches(self.batches_done)", "self.train.batches(0)", SURVIVAL),
    Defect("survival: order of the epoch drawn anew", "training/snapshot.py",
           'generators["data"] = trainer.epoch_start', "pass", SURVIVAL),
    Defect("survival: statistics of the epoch forgotten", "training/snapshot.py",
           'trainer.statistics.load_state_dict(_part(saved.statistics, "epoch"))', "pass", SURVIVAL),
    Defect("survival: generators of the learner forgotten", "training/snapshot.py",
           "generator.bit_generator.state = saved.generators[name]",
           'generator.bit_generator.state = saved.generators["data"]', SURVIVAL),
    Defect("survival: start of the loss forgotten", "training/snapshot.py",
           'trainer.watch.load_state_dict(_part(saved.statistics, "loss"))', "pass", SURVIVAL),
    Defect("survival: state of the optimizer forgotten", "training/snapshot.py",
           "trainer.optimizer.load_state_dict(saved.optimizer)", "pass", SURVIVAL),
    Defect("survival: records of epochs that are done again stay", "training/run_directory.py",
           'if record["epoch"] <= done]', "if True]", "test_training_files"),
    Defect("survival: a checkpoint within an epoch is kept", "training/run_directory.py",
           "self._worth_keeping = checkpoint.batch == 0\n", "self._worth_keeping = True\n", "test_training_files"),
    Defect("survival: a damaged checkpoint is kept", "training/run_directory.py",
           "checkpoint.batch == 0 and not problem", "checkpoint.batch == 0", "test_training_files"),
    Defect("survival: what a killed save left stays", "training/run_directory.py",
           "        remove_leftovers(self.path)\n", "", "test_training_files"),
    Defect("survival: no lock while training", "training/trainer.py",
           "with self.directory.locked(), self.interruptions:", "with self.interruptions:", SURVIVAL),
    Defect("survival: an interrupted run is not saved", "training/trainer.py",
           "Interrupted:\n                self._save()\n", "Interrupted:\n", SURVIVAL),
    Defect("relaxation: forgotten", "ops/update.py", "if relaxation != 1.0:", "if False:", "test_schedules"),
    Defect("relaxation: of the new state alone", "ops/update.py",
           "self.xp.add(s, change, out=fresh)", "fresh[...] = change", "test_schedules"),
    Defect("relaxation: states not, where nothing is measured", "ops/update.py",
           "and s.dtype == g.dtype and relaxation == 1.0:", "and s.dtype == g.dtype:", "test_cuda_update"),
    Defect("relaxation: the last update too", "settling.py",
           "measure, 1.0 if asked else relaxation)", "measure, relaxation)", "test_schedules"),
    Defect("relaxation: part of the residual", "settling.py",
           "phase.scale * phase.relaxation", "phase.scale", "test_schedules"),
    Defect("relaxation: not part of a graph's key", "settling.py",
           "phase.repeat((measure, relaxation),", "phase.repeat(measure,", "test_replay"),
    Defect("relaxation: of the nudged phase forgotten", "learning/equilibrium.py",
           '"relaxation": self.relaxation,', '"relaxation": 1.0,', "test_equilibrium"),
    Defect("survival: signals stay caught after the run", "training/interruption.py",
           "signal.signal(number, signal.SIG_DFL if handler is None else handler)", "pass", SURVIVAL),
    Defect("survival: files are written in place", "files.py",
           "        yield temporary\n", "        yield path\n        shutil.copyfile(path, temporary)\n", "test_files"),
    Defect("divergence: saved all the same", "training/trainer.py",
           "self._means(self.epochs_done + 1)  # what has diverged is not saved", "pass", "test_divergence"),
    Defect("divergence: parameters not looked at", "training/snapshot.py",
           "check_arrays(parameters | optimizer,", "check_arrays({},", "test_divergence"),
    Defect("divergence: halved once for all", "training/schedules.py", "0.5**halvings", "0.5", "test_divergence"),
    Defect("divergence: nothing is taken back", "training/trainer.py",
           "restore_snapshot(self, *self.directory.epoch_start())", "pass", "test_divergence"),
    Defect("divergence: the batch is one too early", "training/divergence.py",
           "batch {good + 1}", "batch {good}", "test_divergence"),
    Defect("divergence: a single high loss will do", "training/divergence.py",
           "* (1 / LONG)", "* (10 / LONG)", "test_divergence"),
    Defect("divergence: a loss that has fallen since is forgotten", "training/divergence.py",
           'self.device.xp.maximum(sums["peak"], sums["mean"])', 'sums["mean"]', "test_divergence"),
    # The core as a graph.
    Defect("skips: a skip's feedback is lambda, whatever it skips", "graph.py",
           "feedback ** (depths[above] - depths[below]) if below", "feedback if below", GRAPH),
    Defect("skips: depth by the shortest path", "graph.py",
           "1 + max(depths[self.below[c]]", "1 + min(depths[self.below[c]]", GRAPH),
    Defect("skips: neighbours of one colour", "graph.py",
           "for colour in range(len(taken) + 1) if colour not in taken)",
           "for colour in range(len(taken) + 1) if colour not in sorted(taken)[:1])", GRAPH),
    Defect("skips: two biases into a node", "graph.py", "len(biased) <= 1", "len(biased) <= 2", GRAPH),
    Defect("skips: a connection twice", "graph.py", "seen.add((c.below, c.above))", "pass", GRAPH),
    Defect("skips: several outputs", "graph.py", "len(ends) == 1", "len(ends) >= 1", GRAPH),
    Defect("skips: nodes of identities", "graph.py",
           "not all(isinstance(self.edges[c], Identity) for c in into)", "True", GRAPH),
    Defect("skips: identities of a flattened state", "graph.py",
           "not isinstance(edge, Identity)  #", "True  #", GRAPH),
    Defect("skips: an edge in two connections", "graph.py",
           "trained.count(id(c.edge)) <= 1", "trained.count(id(c.edge)) <= 2", GRAPH),
    Defect("skips: any name of a node", "graph.py", "[A-Za-z0-9_-]+", ".+", GRAPH),
    Defect("skips: a sum goes on from the last iteration's", "program.py",
           "(self._count[out] - 1) % of > 0", "(self._count[out] - 1) % of >= 0", GRAPH),
    Defect("skips: terms overwrite each other", "program.py",
           "(self._count[out] - 1) % of > 0", "False", GRAPH),
    Defect("skips: lifetimes without the last reading", "program.py",
           "if value in _read(self.body[place]) or value in _written(self.body[place]):",
           "if value in _written(self.body[place]):", GRAPH),
    Defect("skips: lifetimes without later additions", "program.py",
           "if value in _read(self.body[place]) or value in _written(self.body[place]):",
           "if isinstance(self.body[place], Update) and value in _read(self.body[place]):", GRAPH),
    Defect("skips: lifetimes end with the iteration", "program.py",
           "            for step in range(length):\n", "            for step in range(length - first):\n", GRAPH),
    Defect("skips: what a sweep keeps is not always alive", "program.py",
           'if not fresh or value.kind == "kept":', "if not fresh:", GRAPH),
    Defect("skips: a sweep keeps the other input", "program.py",
           "return Update(node, kept, topdown, topdown)", "return Update(node, kept, topdown, kept)", GRAPH),
    Defect("skips: synchronous, top-down products of moved states", "program.py",
           "        yield from writer.topdowns(node)\n        yield writer.update(node)\n",
           "        yield writer.update(node)\n        yield from writer.topdowns(node)\n", GRAPH),
    Defect("skips: a colour's drives after its updates", "program.py",
           "            yield from writer.drives(node)\n            yield from writer.topdowns(node)\n"
           "            yield writer.update(node)\n",
           "            yield from writer.topdowns(node)\n            yield writer.update(node)\n"
           "            yield from writer.drives(node)\n", RANDOM),
    Defect("skips: a warm sweep goes up first", "program.py",
           "for down in (warm, not warm):", "for down in (False, True):", RANDOM),
    Defect("skips: a warm sweep without the start's drives", "program.py",
           'value.kind in ("drive", "kept")]', 'value.kind == "drive"]', RANDOM),
    Defect("skips: winners of a warm start not found", "program.py",
           "if wanted or any(c in unfound for c in graph.into[node]):", "if wanted:", RANDOM),
    Defect("skips: images drive deviations", "program.py",
           "if not self.graph.below[c] and self.image]", "if not self.graph.below[c]]", GRAPH),
    Defect("skips: places of the living", "memory/layout.py",
           "if requests[m].alive & requests[n].alive)", "if requests[m].alive & requests[n].alive & 1)", GRAPH),
    Defect("skips: a gap that is too small", "memory/layout.py",
           "if places[n] + sizes[n] <= start:", "if places[n] < start:", GRAPH),
    Defect("skips: places go down", "memory/layout.py",
           "places[n] = max(places[n], end)", "places[n] = end", GRAPH),
    Defect("skips: a term is added twice", "phases.py", "values[out] += term", "values[out] += 2 * term", GRAPH),
    Defect("skips: a term is not added", "phases.py",
           "            values[out] += term\n", "            pass\n", GRAPH),
    Defect("skips: all connections of a node with the weight of one", "phases.py",
           "            term *= factor\n", "            pass\n", GRAPH),
    Defect("skips: shares of drives on the way down", "phases.py",
           "if is_drive == self.scales_drives else 1.0", "if is_drive != self.scales_drives else 1.0", GRAPH),
    Defect("skips: the image drives the first phase alone", "phases.py",
           "            drive[phase * n : (phase + 1) * n] = drive[:n]\n", "            pass\n", GRAPH),
    Defect("skips: energy of the last drive into a node", "energy.py",
           "drives[above - 1] += own", "drives[above - 1] = own", GRAPH),
    Defect("skips: top-down scales of the nodes above", "energy.py",
           "return self._scales(self.graph.below)", "return self._scales(self.graph.above)", GRAPH),
    Defect("skips: second product with the weights of earlier skips", "energy.py",
           "self.array *= factor / self._factor", "self.array *= factor", GRAPH),
    Defect("skips: second product with lambda for all skips", "energy.py",
           ".scaled(self.ratios[c])", ".scaled(self.feedback)", GRAPH),
    Defect("skips: BPTT with lambda for all skips", "energy.py",
           "self.ratios[connection], out=scaled", "self.feedback, out=scaled", GRAPH),
    Defect("skips: BP down the last connection alone", "learning/backprop.py",
           "                    passes.mu[below - 1] += out\n", "                    pass\n", RANDOM),
    Defect("skips: BP up the first connection alone", "learning/backprop.py",
           "                    drive += out\n", "                    pass\n", RANDOM),
    Defect("skips: features stay at names", "signals.py",
           "self.features = dict(zip(self.layers, self.features.values(), strict=True))", "pass", GRAPH),
    Defect("skips: a node twice, by name and number", "signals.py",
           "not repeat: {self.layers}\")\n        self.device,",
           "not repeat\") if False else None\n        self.device,", GRAPH),
]  # fmt: skip


def copy_project(folder: Path) -> None:
    """Copy package, tests and settings, and a pytest plugin that proves that the copy is what runs."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cupyep", folder / "cupyep", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    for name in ("tools", "docs", ".ci"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "CHANGELOG.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    (folder / "from_the_copy.py").write_text(
        f"import cupyep\nassert cupyep.__file__.startswith({str(folder)!r}), cupyep.__file__\n"
    )


def run_tests(folder: Path, tests: str, limit: float | None = None) -> tuple[int, str]:
    """Run test files in the copy up to the first failure; return pytest's exit status and the end of its output.

    After `limit` seconds they are ended, with all that they started, and the status is `HANGS`.
    """
    files = [f"tests/{name}.py" for name in tests.split()]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "CUPYEP_REQUIRE_GPU": "0"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "from_the_copy", *files]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException as error:  # an interruption, too, must leave nothing behind
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return HANGS, ""
    return process.returncode, output[-2000:]


def planted(folder: Path, defect: Defect) -> str:
    """Return the text of a module with the defect; raise if its place is not found exactly once."""
    source = (folder / "cupyep" / defect.file).read_text()
    if source.count(defect.old) != 1:
        raise LookupError(f"'{defect.old}' occurs {source.count(defect.old)} times in {defect.file}, not once")
    return source.replace(defect.old, defect.new)


def judge(folder: Path, file: str, changed: str, tests: str, limit: float | None = None) -> str:
    """Return ``killed``, or what is wrong, of the tests of a module that has another text."""
    path = folder / "cupyep" / file
    source = path.read_text()
    path.write_text(changed)
    try:
        status, output = run_tests(folder, tests, limit)
    finally:
        path.write_text(source)
    if status in (1, HANGS):
        return "killed"
    return "SURVIVED" if status == 0 else f"TESTS DID NOT RUN (pytest status {status})\n{output}"


def judge_defect(folder: Path, defect: Defect) -> str:
    try:
        return judge(folder, defect.file, planted(folder, defect), defect.tests)
    except LookupError as error:
        return f"NOT PLANTED: {error}"


def judge_mutant(folder: Path, mutant: Mutant, limit: float) -> str:
    """Return ``killed`` also where nothing can be imported any more; else what is wrong and the change."""
    verdict = judge(folder, mutant.file, mutant.source, mutant.tests, limit)
    if verdict.startswith("TESTS DID NOT RUN"):
        return "killed"
    return verdict if verdict == "killed" else f"{verdict}\n{mutant.diff}"


def judge_all(folder: Path, chosen: list[tuple[str, str, Callable[[], str]]]) -> list[str]:
    """Judge what is chosen, each a name, test files and how to judge; return the verdicts, none if tests fail as is."""
    files = sorted({test for _, tests, _ in chosen for test in tests.split()})
    status, output = run_tests(folder, " ".join(files))
    if status != 0:
        print(f"the tests must pass before a defect is planted (pytest status {status})\n{output}")
        return []
    verdicts = []
    for name, _, judged in chosen:
        start = time.perf_counter()
        verdicts.append(judged())
        print(f"{time.perf_counter() - start:5.1f} s  {name}: {verdicts[-1]}", flush=True)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant defects and demand that tests fail.")
    parser.add_argument("word", nargs="?", default="", help="of the descriptions of the hand-picked defects")
    parser.add_argument("--random", type=int, metavar="N", help="draw so many defects instead")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--module", default="", help="part of the path of the modules drawn from")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a drawn defect has been noticed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that tests and the copy end with this script
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_project(folder)
        if options.random is None:
            chosen = [d for d in DEFECTS if options.word in d.what]
            judged = [(d.what, d.tests, functools.partial(judge_defect, folder, d)) for d in chosen]
            places = [d.file for d in chosen]
        else:
            drawn = draw(options.random, options.seed, options.module)
            judge_one = functools.partial(judge_mutant, folder, limit=options.limit)
            judged = [(f"{m.file}, {m.operator}", m.tests, functools.partial(judge_one, m)) for m in drawn]
            places = [m.file for m in drawn]
        verdicts = judge_all(folder, judged)
    killed = [file for file, verdict in zip(places, verdicts, strict=False) if verdict == "killed"]
    if options.random is not None:
        for file in sorted(set(places)):
            print(f"{file}: {killed.count(file)} of {places.count(file)}")
    print(f"{len(killed)} of {len(places)} defects killed")
    return 1 if len(killed) < len(places) or not places else 0


if __name__ == "__main__":
    sys.exit(main())
