"""Puts deliberate faults into the library, one at a time, and reports which ones the tests see.

    python tools/faults.py                  # all faults
    python tools/faults.py reset twin       # the faults with one of these words in their name
    python tools/faults.py --list
    python tools/faults.py --jobs 4 --control

The tests run against a copy of the checkout in a temporary folder. The checkout stays as it is. A
fault that the named tests do not see is printed as NOT CAUGHT, and the exit status is 1. With
``--control``, the named tests run first without any fault, because a test that always fails catches
nothing.

``FAULTS`` is the table. A fault replaces one piece of text, which must be in its file exactly once.
``tests/test_faults.py`` checks the table against the sources in every run of the suite.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/acdc"
TIMEOUT = 900  # seconds; a fault may make a loop endless

# Python imports ``sitecustomize`` after the hook of an editable install, which it removes, so that
# PYTHONPATH decides which ``acdc`` is imported.
SITECUSTOMIZE = """\
import sys

for finder in list(sys.meta_path):
    if "ScikitBuildRedirectingFinder" in type(finder).__name__:
        sys.meta_path.remove(finder)
"""


@dataclass(frozen=True)
class Fault:
    """A deliberate fault.

    Args:
        name: What is wrong, in a few words.
        file: The file below ``src/acdc``.
        old: Text that is in the file exactly once.
        new: Text that takes its place.
        tests: Arguments of pytest: the tests that should see the fault.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


CONTRACT = "tests/test_contract.py"
STOP = f"{CONTRACT} -k 'stopping_and_resuming and global'"

FAULTS = [
    # --- trainers ---
    Fault(
        "a resumed Lightning run cuts the model again",
        "integrations/lightning.py",
        "trainer.optimizers, state=loaded)",
        "trainer.optimizers)",
        "tests/test_integrations.py -k 'killed_and and lightning'",
    ),
    Fault(
        "a resumed transformers run begins a new sparsifier",
        "integrations/transformers.py",
        "            state=saved,\n",
        "",
        "tests/test_integrations.py -k 'killed_and and transformers'",
    ),
    Fault(
        "accelerate does not save the sparsifier",
        "integrations/accelerate.py",
        "    accelerator.register_for_checkpointing(sparsifier)\n",
        "",
        "tests/test_integrations.py -k 'killed_and and accelerate'",
    ),
    Fault(
        "a schedule of another length than the training is accepted",
        "integrations/shared.py",
        "total is not None and schedule.total != total",
        "False",
        "tests/test_integrations.py -k 'another_length or refuses_settings'",
    ),
    Fault(
        "the pair is that of the best model, which was loaded after training",
        "integrations/transformers.py",
        "ended = state.global_step >= state.max_steps or control.should_training_stop",
        "ended = False",
        "tests/test_integrations.py -k best_model",
    ),
    Fault(
        "states of removed checkpoints stay",
        "integrations/transformers.py",
        "path.unlink(missing_ok=True)",
        "pass",
        "tests/test_integrations.py -k best_model",
    ),
    # --- counts, supports -----------------------------------------------------------------------
    Fault("kept() keeps one weight too many", "support.py",
          "return numel - round(Fraction(", "return numel + 1 - round(Fraction(",
          "tests/test_support.py"),
    Fault("kept() rounds in binary floating point", "support.py",
          "Fraction(repr(float(sparsity))) * numel)", "sparsity * numel)",
          "tests/test_support.py"),
    Fault("kept() rounds zeros down", "support.py",
          "return numel - round(Fraction(repr(float(sparsity))) * numel)",
          "return numel - int(Fraction(repr(float(sparsity))) * numel)",
          "tests/test_support.py"),
    Fault("masks are packed with the first weight in the highest bit", "support.py",
          "return (bits << torch.arange(8, dtype=torch.uint8))",
          "return (bits << torch.arange(7, -1, -1, dtype=torch.uint8))",
          "tests/test_support.py"),
    Fault("churn counts only weights that came back", "support.py",
          "v ^ old[k].to(v.device)", "v & ~old[k].to(v.device)",
          "tests/test_support.py"),
    Fault("the digest of a support ignores names", "support.py",
          'f"{name}:{tuple(mask.shape)};"', 'f"{tuple(mask.shape)};"',
          "tests/test_support.py"),
    # --- schedules ------------------------------------------------------------------------------
    Fault("a phase begins one step late", "schedule.py",
          "return self.phases[max(0, bisect_right(self._starts, step) - 1)]",
          "return self.phases[max(0, bisect_right(self._starts, step - 1) - 1)]",
          "tests/test_schedule.py"),
    Fault("the last dense phase has the length of the others", "schedule.py",
          'clock.before(last_sparse, self.last_dense or self.dense, "last_dense")',
          'clock.before(last_sparse, self.dense, "last_dense")',
          "tests/test_schedule.py"),
    Fault("the sparsity ramp ends one step early", "schedule.py",
          "past = Fraction(step - start, stop - start) if",
          "past = Fraction(step + 1 - start, stop - start) if",
          "tests/test_schedule.py tests/test_methods.py -k 'docstrings or cubic or nested'"),
    Fault("the sparsity ramp is quadratic", "schedule.py",
          "(begin - end) * left**3", "(begin - end) * left**2",
          "tests/test_methods.py -k 'cubic or nested'"),
    Fault("what comes again and again comes once more at the end", "schedule.py",
          "while round(now) < stop:\n        steps.append(",
          "while round(now) <= stop:\n        steps.append(",
          "tests/test_schedule.py tests/test_methods.py"),
    Fault("rounding errors of epochs add up", "schedule.py",
          "begin, now = now, clock.after(now, duration, kind)",
          "begin, now = now, Fraction(round(clock.after(now, duration, kind)))",
          "tests/test_schedule.py"),
    # --- ranking, patterns ----------------------------------------------------------------------
    Fault("ties go to the last weights", "topk.py",
          "flatten()[:ties]", "flatten()[-ties:]",
          "tests/test_pattern.py"),
    Fault("-0.0 ranks below 0.0", "topk.py",
          "bits = (chunk.to(dtype) + 0.0).view(integer)", "bits = chunk.to(dtype).view(integer)",
          "tests/test_pattern.py"),
    Fault("NaN is ranked", "topk.py",
          "if first and (histogram[:_EXTREMES]", "if False and (histogram[:_EXTREMES]",
          "tests/test_pattern.py"),
    Fault("the floor is ignored under the global scope", "topk.py",
          "        if not short:\n", "        if True:\n",
          "tests/test_pattern.py"),
    Fault("what a floor takes is not taken from the others", "topk.py",
          "k - sum(least[name] for name in held))", "k)",
          "tests/test_pattern.py"),
    Fault("the last 16 bits of a score are not looked at", "topk.py",
          "for shift in range(width - 16, -1, -16):", "for shift in range(width - 16, 15, -16):",
          "tests/test_pattern.py"),
    Fault("N:M keeps N + 1", "pattern.py",
          "indices[:, : self.n]", "indices[:, : self.n + 1]",
          "tests/test_pattern.py"),
    Fault("N:M keeps the smallest", "pattern.py",
          "groups.sort(dim=1, descending=True, stable=True)",
          "groups.sort(dim=1, descending=False, stable=True)",
          "tests/test_pattern.py"),
    Fault("ERK loses the remainder", "pattern.py",
          "counts[name] - share[name])[:short]", "counts[name] - share[name])[: short // 2]",
          "tests/test_pattern.py"),
    Fault("ERK goes by the largest dimension", "pattern.py",
          "fans = {name: Shape.of(shape).fans", "fans = {name: max(shape)",
          "tests/test_pattern.py"),
    Fault("ERK takes a stack of matrices for one", "shape.py",
          "return self.stack * (self[0] // self.stack + sum(self[1:]))", "return sum(self)",
          "tests/test_layers.py -k erk"),
    Fault("groups run along axis 1 of every weight", "pattern.py",
          "score, axis = scores[name], scores.shapes[name].inputs", "score, axis = scores[name], 1",
          "tests/test_layers.py -k 'inputs or conv1d'"),
    Fault("blocks cross the matrices of a stack", "shape.py",
          "return self[self.outputs] // self.stack", "return self[self.outputs]",
          "tests/test_layers.py -k gates"),
    Fault("groups cross those of a transposed convolution", "shape.py",
          "return self[self.inputs] // self.groups", "return self[self.inputs]",
          "tests/test_layers.py -k grouped"),
    Fault("a ranking forgets the axes of the weights", "methods/weights.py",
          "        return shapes_of(self._params)",
          "        return {name: Shape(param.shape) for name, param in self._params.items()}",
          "tests/test_layers.py -k 'four_phases and u-net'"),
    Fault("the floor is ignored under the uniform scope", "pattern.py",
          "{name: max(kept(n, sparsity), min(floor, n)) for name, n in sizes.items()}",
          "{name: kept(n, sparsity) for name, n in sizes.items()}",
          "tests/test_pattern.py"),
    Fault("an override is ignored", "pattern.py",
          "max(kept(numel, sparsity), min(self.floor, numel))",
          "max(kept(numel, self.sparsity), min(self.floor, numel))",
          "tests/test_pattern.py"),
    Fault("a block counts as its largest score", "pattern.py",
          "parts.sum(dim=(1, 3))", "parts.amax(dim=(1, 3))",
          "tests/test_pattern.py"),
    Fault("saliency is the gradient alone", "score.py",
          "(w * _grad(w)).abs()", "_grad(w).abs()",
          "tests/test_pattern.py tests/test_methods.py -k 'scores or saliency'"),
    Fault("magnitude has a sign", "score.py",
          "_lazy(params, lambda w: w.abs())", "_lazy(params, lambda w: w)",
          f"tests/test_pattern.py {CONTRACT} -k 'scores or at_the_compression'"),
    Fault("random scores ignore their seed", "score.py",
          'stream("scores", *words, index[name])', 'stream("scores", index[name])',
          "tests/test_pattern.py tests/test_methods.py -k 'random'"),
    Fault("scores outside a mask tie with zeros inside", "score.py",
          "masked_fill(~shards.local(mask), -1.0)", "masked_fill(~shards.local(mask), 0.0)",
          "tests/test_methods.py"),
    Fault("skip_last is ignored", "layers.py",
          "elif self.skip_last and order[-1:]", "elif False and order[-1:]",
          "tests/test_pattern.py"),
    Fault("frozen layers are pruned", "kinds.py",
          "if not param.requires_grad:", "if False:",
          f"tests/test_pattern.py {CONTRACT} -k 'frozen'"),
    Fault("an embedding is pruned", "kinds.py",
          "return embedding and holder.key ==", "return False and holder.key ==",
          "tests/test_layers.py -k embedding"),
    Fault("only the first name of a tied weight means it", "kinds.py",
          "{other for alias in aliases[id(param)] for other in _names(alias)}",
          "set(_names(name))",
          "tests/test_layers.py -k tied_weight"),
    Fault("Conv1D is taken for a layer [outputs, inputs]", "kinds.py",
          'return "linear", Shape(sizes, outputs=1, inputs=0)', 'return "linear", Shape(sizes)',
          "tests/test_layers.py -k conv1d"),
    Fault("adapters are pruned", "kinds.py",
          "    if why := adapted.reason(aliases):\n", "    if why := None:\n",
          "tests/test_layers.py -k adapters"),
    Fault("a standardised convolution is pruned", "kinds.py",
          "if not same(twice - none, 2 * (some - none)):", "if False:",
          "tests/test_layers.py -k trying"),
    Fault("other types of layers are pruned", "layers.py",
          "        if weight.kind not in self.types:\n", "        if False:\n",
          "tests/test_layers.py tests/test_pattern.py -k 'layers'"),
    Fault("only what does not divide is listed as refused", "methods/families.py",
          "return chosen, others | misfits", "return chosen, misfits",
          "tests/test_layers.py -k 'four_phases or reasons'"),
    Fault("a transposed convolution costs its output pixels", "positions.py",
          'if use.kind == "conv" and use.shape.outputs == 1:', "if False:",
          "tests/test_layers.py -k transposed_convolution"),
    # --- files ----------------------------------------------------------------------------------
    Fault("the bitmask has the wrong bit order", "bitmask.py",
          'np.packbits(flat.numpy(), axis=1, bitorder="little")',
          "np.packbits(flat.numpy(), axis=1)",
          "tests/test_pair.py"),
    Fault("row offsets are those of the next row", "bitmask.py",
          "offsets = per_row.cumsum(0) - per_row", "offsets = per_row.cumsum(0)",
          "tests/test_pair.py"),
    Fault("bits after the end of a row are not checked", "bitmask.py",
          "if bits[:, columns:].any() or compressed.shape", "if compressed.shape",
          "tests/test_pair.py tests/test_result.py"),
    Fault("kept values lose their bits", "bitmask.py",
          "flat[mask] = as_integers(compressed)",
          "flat[mask] = as_integers(compressed + 0)",
          "tests/test_pair.py"),
    Fault("files are not flushed before they are renamed", "files.py",
          "            _flush(self._aside / name)\n", "            pass\n",
          "tests/test_pair.py"),
    Fault("the folder is not flushed after files are moved into it", "files.py",
          "    _flush(folder)\n    saved.rmdir()\n", "    saved.rmdir()\n",
          "tests/test_pair.py -k 'on_the_disk'"),
    Fault("files are copied into place, not renamed", "files.py",
          "        os.replace(path, folder / path.name)\n",
          "        shutil.copy(path, folder / path.name)\n        path.unlink()\n",
          "tests/test_pair.py -k 'on_the_disk'"),
    Fault("reading does not look for a save that was killed", "files.py",
          "return (path.parent / _SAVED / path.name).read_bytes()", "return path.read_bytes()",
          "tests/test_files.py tests/test_pair.py -k 'killed or dies'"),
    Fault("the next save does not end what a killed one began", "files.py",
          "        _put_in_place(self.folder)\n        if self._aside.is_dir():\n",
          "        if self._aside.is_dir():\n",
          "tests/test_files.py"),
    Fault("what a killed save wrote aside is saved with other files", "files.py",
          "            shutil.rmtree(self._aside)  # of a save that was killed\n"
          "        self._aside.mkdir()\n",
          "            pass\n        self._aside.mkdir(exist_ok=True)\n",
          "tests/test_files.py"),
    Fault("two saves into one folder do not wait for each other", "files.py",
          "if not _locked(self._lock, _PATIENCE):", "if False:",
          "tests/test_files.py -k 'threads or too_long'"),
    Fault("a quota is no lack of space", "files.py",
          "{errno.ENOSPC, errno.EDQUOT, errno.EFBIG}", "{errno.ENOSPC, errno.EFBIG}",
          "tests/test_files.py -k quota"),
    Fault("a save replaces a link by a file", "files.py",
          "        if stat.S_ISREG(mode):\n            return\n        found",
          "        if not stat.S_ISDIR(mode):\n            return\n        found",
          "tests/test_files.py -k regular_files"),
    Fault("a lock whose file was removed counts", "files.py",
          "                continue  # the process that held the lock removed the file\n",
          "                pass\n",
          "tests/test_files.py -k 'made_again'"),
    Fault("a second run in a folder is not refused", "runs/train.py",
          "    if not fabric.is_global_zero:\n        return nullcontext()\n",
          "    if fabric.is_global_zero:\n        return nullcontext()\n",
          "tests/test_damage.py -k 'second_run'"),
    Fault("the hash of a checkpoint is not compared", "runs/sealed.py",
          "if data[-_LENGTH:] != _MARK + digest.encode():", "if not digest:",
          "tests/test_damage.py -k 'every_bit'"),
    Fault("a checkpoint without its hash is read", "runs/checkpoint.py",
          "if form != (FORMAT if has_hash else 1):", "if form not in (1, FORMAT):",
          "tests/test_damage.py -k 'did_not_write'"),
    Fault("the checkpoint before the last is not kept", "runs/checkpoint.py",
          "            if last.exists():\n", "            if False:\n",
          "tests/test_damage.py -k 'one_before'"),
    Fault("a damaged checkpoint becomes the one before the last", "runs/checkpoint.py",
          "        _set_aside(folder)\n", "        pass\n",
          "tests/test_damage.py -k 'one_before'"),
    Fault("a checkpoint of another shape is loaded", "runs/contents.py",
          '    _check_optimizer(state["optimizer"], run, "the optimizer")\n', "",
          "tests/test_damage.py -k 'optimizer'"),
    Fault("the checkpoint of the dense twin does not hold the sparse network", "runs/checkpoint.py",
          '"sparse": pair.sparse, "facts": pair.facts', '"sparse": pair.dense, "facts": pair.facts',
          "tests/test_damage.py -k 'one_before'"),
    Fault("damaged lines of the metrics are not named", "runs/events.py",
          "        if damaged:\n", "        if False:\n",
          "tests/test_damage.py -k 'damaged_lines'"),
    Fault("half a line is left in the metrics", "runs/record.py",
          'return file.read(size).rfind(b"\\n") + 1', "return len(file.read(size))",
          "tests/test_damage.py -k 'were_cut'"),
    Fault("the checksum of a sparse file is not compared", "bitmask.py",
          "if len(digest) != 64 or _digest(data, digest.encode()) != digest:",
          "if len(digest) != 64:",
          "tests/test_fuzz.py -k flipped"),
    Fault("a sparse file without a checksum is read alone", "bitmask.py",
          '    if digest is None:\n        raise InputError("it has no checksum")\n',
          "    if digest is None:\n        return\n",
          "tests/test_fuzz.py -k 'flipped or other_files'"),
    Fault("a link is replaced, not followed", "outfile.py",
          "target = Path(os.path.realpath(path))",
          "target = path",
          "tests/test_outfile.py -k link"),
    Fault("a device is replaced by a file", "outfile.py",
          "return not stat.S_ISREG(mode) or _descriptor(path) is not None",
          "return _descriptor(path) is not None",
          "tests/test_outfile.py -k pipe"),
    Fault("the permissions of a file are lost", "outfile.py",
          "        keep_mode(target, written)\n",
          "",
          "tests/test_outfile.py -k permissions"),
    Fault("standard output that is a file is written from its start", "outfile.py",
          "            return int(last) if last.isdigit() else None",
          "            return None",
          "tests/test_outfile.py -k in_its_turn"),
    Fault("a full standard output is no error", "cli/output.py",
          "            _Output.error = error\n",
          "",
          "tests/test_paths.py -k 'full_and_closed'"),
    Fault("an array of a pickle may have any dtype", "runs/data/pickles.py",
          "        whole = isinstance(code, str) and code in _WHOLE\n",
          "        whole = isinstance(code, str)\n",
          "tests/test_data.py -k other_kinds"),
    Fault("a run that goes on elsewhere does not say so", "runs/train.py",
          "            self._warn(moved(self.progress.computed, computed(run)))\n",
          "",
          "tests/test_damage.py -k 'another_cpu or another_machine'"),
    Fault("warnings of a run are forgotten when it stops again", "runs/checkpoint.py",
          '    progress.computed, progress.warnings = state["computed"], state["warnings"]\n',
          '    progress.computed = state["computed"]\n',
          "tests/test_damage.py -k however_often"),
    Fault("a comparison keeps the warnings of its runs to itself", "compare/results.py",
          'return {"warnings": warnings} if warnings else {}',
          "return {}",
          "tests/test_compare.py -k 'warnings_of_runs and 1'"),
    Fault("results that the next command refuses are written", "compare/results.py",
          "        _check_row(found)\n", "        pass\n",
          "tests/test_compare.py -k out_of_bounds"),
    Fault("what the page shows of a record has any type", "runs/shapes.py",
          '    **dict.fromkeys(("finished?", "command?", "device?"), Maybe(str)),\n', "",
          "tests/test_report.py -k 'another_type'"),
    Fault("workers without shared memory are an error of the system", "runs/data/imagenet.py",
          "            raise _no_workers(self.workers, error) from error\n",
          "            raise\n",
          "tests/test_data.py -k 'without_shared_memory and not small'"),
    Fault("a pickle may call what it names", "runs/data/pickles.py",
          "    if name not in _NAMES:\n        raise",
          "    if False:\n        raise",
          "tests/test_data.py -k pickle"),
    Fault("NaN is within every bound", "schema.py",
          "if not shape.least <= value <= shape.most:",
          "if value < shape.least or value > shape.most:",
          "tests/test_schema.py"),
    Fault("a key may be there twice", "schema.py",
          "    if len(found) != len(pairs):",
          "    if len(found) > len(pairs):",
          "tests/test_schema.py"),
    Fault("nesting has no limit", "schema.py",
          "    return any(isinstance(part, dict | list) for part in layer)",
          "    return False",
          "tests/test_schema.py"),
    Fault("a schedule may have a million phases", "schedule.py",
          "    if count > MOST_PHASES:",
          "    if count > 10**9:",
          "tests/test_paths.py -k million"),
    Fault("the hash of a file is not checked", "index.py",
          'if _sha256(data) != entry["sha256"]:', "if False:",
          "tests/test_pair.py tests/test_result.py -k 'flipped or two_saves'"),
    Fault("the hash of the index is not checked", "index.py",
          "if _sha256(text.replace(digest, _ZEROS).encode()) != digest:", "if False:",
          "tests/test_pair.py tests/test_result.py -k 'flipped or two_saves'"),
    # --- masks ----------------------------------------------------------------------------------
    Fault("gradients outside the support are not cleared", "hooks/masking.py",
          "now._dropped.clear(name, param.grad)", "pass",
          f"{CONTRACT} -k 'outside_the_support and global'"),
    Fault("weights outside the support are not projected", "hooks/masking.py",
          "            yield param\n", "            pass\n",
          f"{CONTRACT} -k 'outside_the_support and global'"),
    Fault("the projection is a product with the mask", "hooks/masking.py",
          "self._dropped.clear(name, tensor)", "tensor.mul_(~self._dropped[name])",
          f"{CONTRACT} -k 'dropped_weights or outside_the_support'"),
    Fault("gradients from before the cut are not cleared", "hooks/masking.py",
          "        if not self.dense_gradient:\n            self.clear_gradients()\n", "",
          f"{CONTRACT} tests/test_methods.py -k 'clears or outside_the_support or not_dense'"),
    Fault("averages are not projected", "hooks/masking.py",
          "clear(part, self._dropped[name].to(part.device))", "pass",
          f"{CONTRACT} -k averages"),
    Fault("removing leaves the hooks", "hooks/masking.py",
          '"""Take all hooks off, and the engine."""\n        self._remove_hooks()',
          '"""Take all hooks off, and the engine."""',
          f"{CONTRACT} -k removed"),
    Fault("the engine stays sparse where the dense gradient is wanted", "hooks/masking.py",
          "self.support.is_full or self.dense_gradient else", "self.support.is_full else",
          "tests/test_methods.py -k engine"),
    Fault("a table of pointers outlives the tensors", "hooks/flat.py",
          "if key not in self._tables:", "if not self._tables:",
          "tests/test_gpu.py -k flat"),
    Fault("a step that a CUDA graph captures is counted", "hooks/steps.py",
          'refuse_capture("The optimizer steps", "steps would not be counted")', "pass",
          "tests/test_gpu.py -k capture"),
    Fault("a gradient mask may be captured", "hooks/masking.py",
          'refuse_capture("A gradient is masked", "other weights may be pruned then")', "pass",
          "tests/test_gpu.py -k capture"),
    # --- optimizer state ------------------------------------------------------------------------
    Fault("the optimizer is not reset", "hooks/reset.py",
          "                if self.rule == \"all\":\n                    self._restart(",
          "                if self.rule == \"all\":\n                    (lambda *_: None)(",
          f"{CONTRACT} -k 'first_dense_step'"),
    Fault("the reset touches the weights that stayed", "hooks/fresh.py",
          "torch.where(local(mask), source, here)", "torch.where(~local(mask), source, here)",
          f"{CONTRACT} -k 'reset_of_the_entered'"),
    Fault("the reset touches the weights that left", "sparsifier.py",
          "self._reset.clear(entered=support.entered(self.support))",
          "self._reset.clear(entered=self.support.entered(support))",
          f"{CONTRACT} -k 'reset_of_the_entered or first_dense'"),
    Fault("weights that come back keep their momentum", "hooks/reset.py",
          "if id(param) in masks:", "if False:",
          f"{CONTRACT} tests/test_methods.py -k 'reset_of_the_entered or zero_state'"),
    Fault("Adagrad starts from zero after a reset", "hooks/fresh.py",
          "return float(flat[0]) if", "return 0.0 if",
          f"{CONTRACT} -k 'adagrad and (first_dense or entered)'"),
    Fault("a reset leaves the step count", "hooks/fresh.py",
          'elif mask is None and fresh != "weight":', "elif False:",
          f"{CONTRACT} -k 'first_dense_step'"),
    Fault("state that cannot be reset is not refused", "hooks/reset.py",
          "if form := _unknown(value, param, values.get(key)):",
          "if (form := _unknown(value, param, values.get(key))) and False:",
          f"{CONTRACT} -k 'cannot_be_reset'"),
    Fault("copies of weights in the state keep pruned weights", "hooks/masking.py",
          "yield from self._copies(name)", "yield from ()",
          "tests/test_optimizers.py -k 'average_inside or exact'"),
    Fault("a restart is not compared with a fresh start", "hooks/fresh.py",
          "if not torch.equal(*ends):", "if False:",
          "tests/test_optimizers.py -k 'unknown_fresh'"),
    Fault("a copy of the weight is not known as one", "hooks/fresh.py",
          "torch.equal(value.to(weight.dtype), weight)", "False",
          "tests/test_optimizers.py -k 'average_inside or go_together'"),
    Fault("counters among the options go on after a reset", "hooks/fresh.py",
          "elif isinstance(values.get(key), Tensor):\n                    values[key].fill_(start)",
          "elif True:\n                    pass",
          "tests/test_optimizers.py -k 'first_dense_step_is_fresh'"),
    Fault("a wrapper writes into the state after the reset", "hooks/reset.py",
          "if part.outer and self.rule", "if False and self.rule",
          "tests/test_optimizers.py -k 'exact and Lookahead'"),
    Fault("state that a save has made up counts after a reset", "hooks/reset.py",
          "            self._drop_before_next_step(part)\n\n", "\n",
          "tests/test_optimizers.py -k 'saving_by_torch'"),
    # --- steps of kept elements -----------------------------------------------------------------
    Fault("the stepped vector is not written into the weight", "hooks/kept_steps.py",
          "            weight.write()\n", "",
          "tests/test_kept.py"),
    Fault("a reader of the state finds vectors of kept elements", "hooks/kept_weight.py",
          "        self.make_dense()\n        return method", "        return method",
          "tests/test_kept.py -k 'reads'"),
    Fault("the state that is saved is no plain dictionary", "hooks/kept_steps.py",
          "                state[weight.param] = dict(state[weight.param])\n",
          "                state[weight.param].make_dense()\n",
          "tests/test_kept.py -k 'saved'"),
    Fault("a step in one pass forgets the bias correction", "hooks/kept_rules.py",
          '"root": math.sqrt(1 - beta2**steps),', '"root": 1.0,',
          "tests/test_kept.py -k 'one_pass'"),
    Fault("a step in one pass decays as Adam in AdamW", "hooks/kept_rules.py",
          '"weight_decay": 0.0 if decoupled else decay,', '"weight_decay": decay,',
          "tests/test_kept.py -k 'one_pass'"),
    Fault("a step that unscales by itself is of kept elements", "hooks/kept_steps.py",
          "getattr(self.optimizer, of, None) is not None for of in",
          "of is None for of in",
          "tests/test_kept.py -k 'unscaling'"),
    Fault("a new learning rate does not reach the kept elements", "hooks/kept_steps.py",
          'if k not in ("params", "param_names")',
          'if k not in ("params", "param_names") and (k != "lr" or not group["lr"])',
          "tests/test_kept.py"),
    Fault("a weight that somebody wrote is taken for zero outside", "hooks/kept_steps.py",
          "return weight if weight is not None and weight.version == param._version else None",
          "return weight",
          "tests/test_kept.py"),
    Fault("a mirror step multiplies all where kept elements were stepped", "hooks/mirror.py",
          "        if kept is None:\n            param.mul_",
          "        if True:\n            param.mul_",
          "tests/test_mirror.py -k kept"),
    Fault("a mirror step follows the moments of Adam without their correction", "hooks/mirror.py",
          "(state[\"exp_avg\"] / (1 - beta1**step))", "(state[\"exp_avg\"] * 1.0)",
          "tests/test_mirror.py -k paper"),
    Fault("a mirror step is taken twice by a step inside a step", "hooks/mirror.py",
          "if is_nested(optimizer) or (found_inf", "if (found_inf",
          "tests/test_mirror.py -k closure"),
    Fault("a skipped step has a mirror step", "hooks/mirror.py",
          "is_nested(optimizer) or (found_inf is not None and bool(found_inf))",
          "is_nested(optimizer)",
          "tests/test_mirror.py -k skipped"),
    Fault("a mirror step descends where the optimizer ascends", "hooks/mirror.py",
          "return -grad if group.get(\"maximize\") else grad", "return grad",
          "tests/test_mirror.py -k paper"),
    Fault("gradients stay scaled after a step", "hooks/rows.py",
          "        for param, grad in self._grads:\n            param.grad = grad\n", "",
          "tests/test_rows.py -k finds"),
    Fault("rows are scaled to another mean", "hooks/rows.py",
          "torch.where(mean > 0, mean, 1.0)", "torch.where(mean > 0, mean * 0 + 1, 1.0)",
          "tests/test_rows.py -k factors"),
    Fault("a validation split holds out what is trained on", "runs/data/base.py",
          "return order[held:].sort().values, order[:held]",
          "return order[:-held].sort().values, order[:held]",
          "tests/test_data.py -k place"),
    Fault("gradients do not come back after a step", "hooks/kept_steps.py",
          "        for param, grad in self._grads:\n            param.grad = grad\n", "",
          "tests/test_kept.py"),
    Fault("kept elements are stepped without a reset", "sparsifier.py",
          'whole = self._reset.rule == "none" or bool(self._store.dense)',
          "whole = bool(self._store.dense)",
          "tests/test_kept.py"),
    # --- the dense twin -------------------------------------------------------------------------
    Fault("there is no dense twin", "sparsifier.py",
          "if last is not None and self.step == last.stop:", "if False:",
          f"{CONTRACT} -k 'twin'"),
    Fault("the dense twin is captured after the cut", "sparsifier.py",
          '        last = self.schedule.last("dense")\n        if last is not None',
          '        self._hold(support)\n'
          '        last = self.schedule.last("dense")\n        if last is not None',
          f"{CONTRACT} -k 'twin'"),
    Fault("the dense twin is that of the first dense phase", "sparsifier.py",
          "if last is not None and self.step == last.stop:",
          "if last is not None and self.dense_twin is None:",
          f"{CONTRACT} -k 'twin'"),
    Fault("the dense twin is trained on with the sparse one", "hooks/twin.py",
          'return value.detach().to("cpu", copy=True)', "return value.detach()",
          f"{CONTRACT} -k 'twin'"),
    Fault("restoring the twin shares its optimizer state", "hooks/twin.py",
          "Optimizers(optimizer).load_state_dict(deepcopy(self.optimizer))",
          "Optimizers(optimizer).load_state_dict(self.optimizer)",
          f"{CONTRACT} -k 'twin'"),
    # --- stop and resume ------------------------------------------------------------------------
    Fault("resume forgets the clock", "sparsifier.py",
          'self.step, self.dense_twin = state["step"],', "self.step, self.dense_twin = self.step,",
          STOP),
    Fault("resume forgets the twin", "sparsifier.py",
          "None if twin is None else DenseTwin(**twin)", "None", STOP),
    Fault("resume forgets the support", "sparsifier.py",
          "self._hold(support)  # the model holds", "self._hold(self.support)  # the model holds",
          STOP),
    Fault("resume forgets the dense weights", "hooks/store.py",
          "            for n in dense\n", "            for n in ()\n", STOP),
    Fault("resume forgets which weights are trained", "hooks/store.py",
          "self.trained, self.dense_now = trained, False",
          "self.trained, self.dense_now = None, False", STOP),
    Fault("the state of a method is not saved (thresholds, gradients)", "sparsifier.py",
          '"method_state": self._state,', '"method_state": self.method.init(self._weights),', STOP),
    Fault("resume forgets the last sparse support", "sparsifier.py",
          "self._changes.load(state[\"changes\"], last_sparse)",
          "self._changes.load(state[\"changes\"], None)", STOP),
    Fault("resume forgets that the next step has a dense gradient", "sparsifier.py",
          '        wanted = self.method.training.wants_dense_gradient(self.step)\n'
          '        self._masking.dense_gradient = wanted and self.phase.kind == "sparse"\n'
          "        self._store.load(",
          "        self._store.load(", STOP),
    Fault("the state of another schedule is accepted", "hooks/saved.py",
          "        if theirs != ours:", "        if False:",
          f"{CONTRACT} tests/test_resume.py -k 'another_run or another_past'"),
    Fault("a finished run goes on without the change that is due", "sparsifier.py",
          "if is_due(state, self.method):", "if False:", "tests/test_resume.py -k grow"),
    Fault("a schedule whose dense twin was not kept is accepted", "hooks/saved.py",
          "if last.stop <= step and (twin is None", "if False and (twin is None",
          "tests/test_resume.py -k without_a_twin"),
    Fault("a sparsifier attached from a state cuts first", "sparsifier.py",
          "self.advance() if state is None else self.load_state_dict(state)",
          "self.advance(); state is None or self.load_state_dict(state)",
          "tests/test_resume.py -k cuts_nothing"),
    Fault("the average of the sparse network keeps what was pruned", "hooks/pairing.py",
          "sparse[name].masked_fill_(~mask, 0.0)  # an average", "pass  # an average",
          "tests/test_resume.py -k averages"),
    Fault("a given support is that of the first layer alone", "methods/given.py",
          "for name in params if name in self.support}",
          "for name in list(self.support)[:1]}", "tests/test_given.py"),
    Fault("zeros come back at the first cut", "methods/families.py",
          "return without_zeros(chosen, weights) if self.keep_zeros else chosen",
          "return chosen", "tests/test_given.py"),
    Fault("zeros come back at a later cut", "methods/families.py",
          "return both(chosen, support) if self.keep_zeros else chosen", "return chosen",
          "tests/test_given.py"),
    # --- the clock ------------------------------------------------------------------------------
    Fault("a step that the GradScaler skipped counts", "hooks/steps.py",
          "optimizer, found_inf is None or not bool(found_inf))", "optimizer, True)",
          f"{CONTRACT} tests/test_methods.py -k 'scaler or fused'"),
    Fault("a step that only makes state counts", "hooks/steps.py",
          "if self._found is None and only_makes_state(optimizer):", "if False:",
          "tests/test_optimizers.py -k 'saving_by_torch'"),
    Fault("a step inside a step counts twice", "hooks/steps.py",
          "return running > 1", "return False",
          "tests/test_optimizers.py -k 'Nested'"),
    Fault("a step of two optimizers counts twice", "hooks/steps.py",
          "return len(self.called) == self._size", "return True",
          "tests/test_optimizers.py -k 'one_clock'"),
    Fault("between two optimizers pruned weights are not zero", "hooks/steps.py",
          "                between(index)\n", "                pass\n",
          "tests/test_optimizers.py -k 'one_clock or called_twice'"),
    Fault("steps that are not seen are not noticed", "hooks/watch.py",
          "if self._changes > self._allowed:", "if False:",
          "tests/test_optimizers.py -k 'noticed'"),
    Fault("wrappers of optimizers are not seen through", "hooks/optimizers.py",
          "current = _inner(current) or current", "pass",
          "tests/test_optimizers.py -k 'seen_through'"),
    Fault("a closure is called twice", "hooks/steps.py",
          "return lambda: loss", "return closure",
          f"{CONTRACT} tests/test_methods.py tests/test_kept.py -k closure"),
    Fault("ranks keep supports of their own", "sparsifier.py",
          "self._masking.laid_out(self._weights.peers.agreed(support, self.step))",
          "self._masking.laid_out(support)",
          "tests/test_distributed.py"),
    # --- methods --------------------------------------------------------------------------------
    Fault("an exchange takes one weight too many", "methods/families.py",
          "int(share * kept) for name", "int(share * kept) + 1 for name",
          "tests/test_methods.py"),
    Fault("RigL grows by magnitude", "methods/rigl.py",
          "exchange(support, drop, grow,", "exchange(support, drop, drop,",
          "tests/test_methods.py tests/test_distributed.py -k 'rigl or exchange or grow'"),
    Fault("RigL updates one step late", "methods/rigl.py",
          "if not self.due(step - 1, phase):", "if not self.due(step - 2, phase):",
          "tests/test_methods.py -k 'rigl or exchange'"),
    Fault("what a ramp cut comes back", "methods/families.py",
          "select(score.among(self.rank(weights, state), support))",
          "select(self.rank(weights, state))",
          "tests/test_methods.py -k 'cut or nested'"),
    Fault("WoodFisher forgets all gradients but one", "methods/woodfisher.py",
          "memory[name] = (kept, [*rows, row])", "memory[name] = (kept, [row])",
          "tests/test_methods.py -k woodfisher"),
    Fault("WoodFisher moves the other weights the wrong way", "methods/woodfisher.py",
          "moves.append(root.T @ (root @ v) - v)", "moves.append(v - root.T @ (root @ v))",
          "tests/test_methods.py -k woodfisher"),
    Fault("IMP does not rewind", "methods/imp.py",
          'return "after" if begins else None', "return None", "tests/test_imp.py"),
    Fault("IMP chooses among the weights that it goes back to", "methods/imp.py",
          'return "after" if begins else None', 'return "before" if begins else None',
          "tests/test_imp.py"),
    Fault("IMP goes through the learning rates of the whole run", "methods/imp.py",
          "return self._early + ahead, once", "return step, once", "tests/test_imp.py"),
    Fault("a step is in a mean twice", "hooks/mean.py",
          "if not nth or step == self._noted:", "if not nth:",
          "tests/test_acdc_options.py -k again"),
    Fault("every step of a mean weighs the same as all before", "hooks/mean.py",
          "local(mean).lerp_(local(value), 1 / nth)", "local(mean).lerp_(local(value), 0.5)",
          "tests/test_acdc_options.py -k mean"),
    Fault("a mean is lost at a stop", "hooks/mean.py",
          '"network": dict(self.tensors)', '"network": {}', "tests/test_imp.py -k resumes"),
    Fault("running variances are multiplied by norms, not by their squares", "hooks/rescale.py",
          "(norm.running_var, 2)", "(norm.running_var, 1)", "tests/test_acdc_options.py -k norms"),
    Fault("a BatchNorm that reads something else is rescaled", "hooks/rescale.py",
          "as_it_was = output() is x and x._version == version", "as_it_was = output() is x",
          "tests/test_acdc_options.py -k reads_as_it_is"),
    Fault("a taper of AC/DC counts the phase itself", "methods/acdc.py",
          "other.start > phase.start for", "other.start >= phase.start for",
          "tests/test_acdc_options.py -k keeps_so"),
    Fault("norms are those of the last cut", "methods/families.py",
          "return state or {name: _norms", "return {name: _norms",
          "tests/test_acdc_options.py -k norms"),
    Fault("partial decompressions grow by magnitude", "methods/partial.py",
          "support, score.gradient(weights),", "support, score.magnitude(weights),",
          "tests/test_partial.py"),
    Fault("GraNet grows by magnitude", "methods/granet.py",
          "score.magnitude(weights), score.gradient(weights), share",
          "score.magnitude(weights), score.magnitude(weights), share",
          "tests/test_methods.py -k granet"),
    Fault("the thresholds of STR do not learn", "methods/str_.py",
          "learned[name] = self.threshold.learn(threshold, weights[name], gradient, rate)",
          "learned[name] = threshold",
          "tests/test_methods.py -k 'threshold'"),
    Fault("STR does not shrink what it keeps", "methods/str_.py",
          "return self.threshold.shrink(weight, state[name])", "return weight",
          "tests/test_methods.py -k 'threshold or str'"),
    Fault("SNFS rounds the number that leaves down", "methods/snfs.py",
          "leaving = math.ceil(part * kept)", "leaving = math.floor(part * kept)",
          "tests/test_methods.py -k 'places or sparsity or momentum'"),
    Fault("Top-KAST trains only what it computes with", "methods/topkast.py",
          "return self.pattern.at(self.backward).select(", "return self.pattern.select(",
          "tests/test_methods.py -k 'top_kast or view'"),
    Fault("Top-KAST draws both sets to zero alike", "methods/topkast.py",
          "outside = self.penalty / (1 - self.pattern.sparsity)", "outside = self.penalty",
          "tests/test_methods.py -k 'top_kast or view'"),
    Fault("the optimizer moves weights outside of the trained set", "hooks/store.py",
          "param.copy_(torch.where(local(self.trained[name]), param, dense))", "pass",
          "tests/test_methods.py -k 'top_kast or view'"),
    Fault("SR-STE decays what it keeps", "methods/srste.py",
          "masked_fill(kept, 0.0)", "masked_fill(~kept, 0.0)",
          "tests/test_methods.py -k 'view'"),
    Fault("AC/DC keeps random weights", "methods/families.py",
          "return score.magnitude(weights)", "return score.random(weights, 0)",
          f"{CONTRACT} -k at_the_compression"),
    Fault("a ramp of AC/DC is a share of the run", "methods/acdc.py",
          "(self.ramp or 0) * len(phase)", "(self.ramp or 0) * phase.stop",
          "tests/test_acdc_options.py"),
    # --- cost -----------------------------------------------------------------------------------
    Fault("a sparse step costs two passes", "methods/training.py",
          "spent = 3 * sparse *", "spent = 2 * sparse *",
          "tests/test_cost.py tests/test_methods.py -k 'training or flops or density'"),
    Fault("a dense step costs two passes", "cost.py",
          "spent += 3 * dense *", "spent += 2 * dense *",
          "tests/test_cost.py"),
    Fault("dense gradients are free", "methods/training.py",
          "spent += (dense - sparse) * sum(", "spent += 0 * sum(",
          "tests/test_cost.py tests/test_methods.py -k 'dense_gradient or flops'"),
    Fault("a short last batch counts in full", "cost.py",
          "return epochs * size + steps * per_step", "return step * per_step",
          "tests/test_cost.py -k 'last_step'"),
    # --- data and learning rates ----------------------------------------------------------------
    Fault("every epoch has the same order", "runs/data/base.py",
          'stream("order", seed, epoch)', 'stream("order", seed, 0)',
          "tests/test_data.py -k 'order or epoch'"),
    Fault("ranks share images", "runs/data/base.py",
          "rows = slice(rank * share, (rank + 1) * share)", "rows = slice(0, share)",
          "tests/test_data.py -k ranks"),
    Fault("a step of the learning rate comes one epoch early", "runs/optim.py",
          "sum(epoch > end for end in self.at)", "sum(epoch >= end for end in self.at)",
          "tests/test_recipes.py -k 'learning_rate or published'"),
    # --- runs -----------------------------------------------------------------------------------
    Fault("metrics are not cut at resume", "runs/record.py",
          "        self._file.truncate(whole)\n        self._file.seek(whole)\n", "",
          "tests/test_train.py -k 'signal or killed_at_every'"),
    Fault("the learning rate is that of the next step", "runs/train.py",
          "run.method.on_curve(before)",
          "run.method.on_curve(before + 1)",
          "tests/test_train.py -k 'learning_rate'"),
    Fault("the network is evaluated after its support changed", "runs/train.py",
          "        evaluation = self._evaluation() if progress.step in self.epoch_ends else None\n"
          "        began = Clocks.now()\n"
          '        if progress.leg == "main":\n            run.sparsifier.advance()\n',
          "        began = Clocks.now()\n"
          '        if progress.leg == "main":\n            run.sparsifier.advance()\n'
          "        evaluation = self._evaluation() if progress.step in self.epoch_ends else None\n",
          "tests/test_train.py"),
    Fault("a resumed epoch begins anew", "runs/train.py",
          "                start=index,\n", "                start=0,\n",
          "tests/test_train.py -k 'signal'"),
    Fault("dropout draws the same in every step", "runs/train.py",
          'seed_of("dropout", run.recipe.seed, progress.batches, rank)',
          'seed_of("dropout", run.recipe.seed, rank)',
          "tests/test_train.py -k dropout"),
    Fault("the twin is trained on with the wrong batches", "runs/train.py",
          'batches=at, batches_at_twin=at, pair=pair',
          'batches=0, batches_at_twin=0, pair=pair',
          "tests/test_train.py -k 'twin'"),
    Fault("a choice of the engine is not on the disk before its step", "runs/train.py",
          "if stop or chosen or judged or", "if stop or judged or",
          "tests/test_train.py -k 'chosen'"),
    Fault("BatchNorm statistics are not estimated anew", "runs/finish.py",
          "        reestimate(run.net, inputs, run.recipe.bn_batches)\n", "",
          "tests/test_train.py -k batchnorm"),
    Fault("one batch more makes the BatchNorm statistics", "runs/batchnorm.py",
          "islice(inputs, batches)", "islice(inputs, batches + 1)",
          "tests/test_train.py -k batchnorm"),
    Fault("resume forgets the optimizer", "runs/checkpoint.py",
          '    run.optimizer.load_state_dict(state["optimizer"])\n', "",
          "tests/test_train.py -k 'signal'"),
    Fault("a run goes on with other data", "runs/checkpoint.py",
          'if state["data"] != run.data.digest():', "if False:",
          "tests/test_train.py -k 'other_data'"),
    Fault("parts of a batch weigh the same whatever their size", "runs/loss.py",
          "(len(inputs) / len(x))", "(1 / len(pairs))",
          "tests/test_train.py -k 'parts'"),
    Fault("ranks of different steps exchange their masks", "processes.py",
          "if any(rank[:3] != mine[:3] for rank in ranks):", "if False:",
          "tests/test_peers.py"),
    Fault("processes that share masks send them although they are equal", "processes.py",
          "return all(rank == mine for rank in ranks)", "return False",
          "tests/test_process_groups.py"),
    Fault("processes keep masks that differ", "processes.py",
          "return all(rank == mine for rank in ranks)", "return True",
          "tests/test_process_groups.py"),
    Fault("the others wait for a process that cannot choose", "processes.py",
          "        except InputError as error:\n            if self:",
          "        except InputError as error:\n            if False:",
          "tests/test_peers.py"),
    Fault("masks are shared by all processes, without DDP as well", "hooks/attach.py",
          "        return Peers(group)\n    if distributed",
          "        return Peers(distributed.group.WORLD if has_peers() else None)\n"
          "    if distributed",
          "tests/test_process_groups.py"),
    Fault("DDP around a model is not seen", "hooks/attach.py",
          "group = group_of(model)", "group = None",
          "tests/test_process_groups.py"),
    Fault("an error between processes is torch's own", "collectives.py",
          "if not has_peers() or not is_of_peers(error):", "if True:",
          "tests/test_peers.py"),
    # --- shards ---------------------------------------------------------------------------------
    Fault("ties between shards go to the last weights", "topk.py",
          "index.neg_().masked_fill_(", "index.masked_fill_(",
          "tests/test_shards.py -k few_and_many"),
    Fault("weights that two ranks hold are counted twice", "topk.py",
          "if not shards.counts_here(score):\n", "if False:\n",
          "tests/test_shards.py -k 'few_and_many or single'"),
    Fault("blocks may lie on two ranks", "shards.py",
          "    return anywhere(not whole, ", "    return anywhere(False, ",
          "tests/test_shards.py -k where_groups_are_cut"),
    Fault("weights that FSDP has gathered stay as they were", "hooks/sharded.py",
          "        module.reshard()\n", "        pass\n",
          "tests/test_shards.py -k evaluated_before_the_change"),
    # --- one model, one optimizer, one sparsifier -----------------------------------------------
    Fault("a second sparsifier is not refused", "hooks/binding.py",
          "        if taken:\n", "        if False:\n",
          "tests/test_binding.py"),
    Fault("a weight that was replaced is not noticed", "hooks/steps.py",
          "            self.check()\n", "",
          "tests/test_binding.py"),
    Fault("a weight in another group is not noticed", "hooks/binding.py",
          "if (now := self._groups_now()) != self._groups:", "if (now := self._groups) is None:",
          "tests/test_binding.py"),
    Fault("a sparsifier that was removed keeps its claim", "hooks/binding.py",
          "            _bound.pop(thing, None)\n", "            pass\n",
          "tests/test_binding.py"),
    Fault("two weights in one memory are not refused", "hooks/binding.py",
          "        _check_memory(model, params)\n", "",
          "tests/test_strange_models.py -k memory"),
    Fault("views of columns count as one memory", "hooks/binding.py",
          "0 < param.numel() == elements", "0 < param.numel()",
          "tests/test_strange_models.py -k columns"),
    Fault("a sparsifier can be copied", "sparsifier.py",
          "    __repr__, __str__, __reduce_ex__ = headline, summary, refuse_copy\n",
          "    __repr__, __str__ = headline, summary\n",
          "tests/test_strange_models.py -k copied"),
    Fault("an optimizer of optimizers is followed without their state", "hooks/optimizers.py",
          "if inside := _several_inside(self.optimizer):", "if inside := []:",
          "tests/test_strange_models.py -k optimizer_of_optimizers"),
    # --- the engine -----------------------------------------------------------------------------
    Fault("threads share a frame", "engine/segment.py",
          "            with self.workspace.lock:\n                lease",
          "            if True:\n                lease",
          "tests/test_engine_threads.py"),
    Fault("a fork leaves the locks to threads that the child lacks", "engine/locks.py",
          "before=_take_all,", "before=_release_all,",
          "tests/test_engine_threads.py -k 'fork'"),
    Fault("torch.fx sees the calls of other threads", "engine/tracing.py",
          "            return forward(*args, **kwargs)\n        if any(hooks_of(m))",
          "            pass\n        if any(hooks_of(m))",
          "tests/test_engine_threads.py -k 'traced'"),
    Fault("a graph is built with the parameters of functional_call", "engine/host.py",
          "if not (self._started and self._has_own_params()):", "if not self._started:",
          "tests/test_engine_modes.py"),
    Fault("a derivative of second order is taken by the kernels", "engine/segment.py",
          "lease.reads_inputs = torch.is_grad_enabled() or", "lease.reads_inputs =",
          "tests/test_engine_modes.py"),
    Fault("tapes outlive the statistics that they name", "engine/segment.py",
          "self._tapes, self._free = {}, {}", "self._free = {key: [] for key in self._free}",
          "tests/test_engine_modes.py -k 'statistics or buffers'"),
    Fault("a backward pass has more threads than its buffers", "engine/segment.py",
          " or torch.get_num_threads() != lease.threads", "",
          "tests/test_engine_threads.py -k 'another_number'"),
    Fault("forward-mode derivatives are lost", "engine/modes.py",
          "if forward_ad._current_level >= 0:", "if False:",
          "tests/test_engine_modes.py -k 'dual or forward'"),
    # --- export, doctor -------------------------------------------------------------------------
    Fault("a weight is written sparse where that makes it larger", "export/onnx_sparse.py",
          "return bool(kept.size * (array.itemsize + _INDEX) < array.nbytes)", "return True",
          "tests/test_export.py -k smaller"),
    Fault("the length of a token sequence is held fixed", "export/onnx_inputs.py",
          "dims[-1][1] = names[length]", "pass",
          "tests/test_export.py -k varies"),
    Fault("two OpenMP libraries are not seen", "doctor.py",
          "if len(found) > 1:", "if len(found) > 2:",
          "tests/test_doctor.py"),
    Fault("a second distribution that owns acdc/ is not seen", "doctor.py",
          "if names not in ([], [DISTRIBUTION]):", "if DISTRIBUTION not in names:",
          "tests/test_doctor.py -k distribution"),
    Fault("more threads than CPUs are not seen", "doctor.py",
          "if own is not None and threads > len(own):",
          "if own is not None and threads > 2 * len(own) + 2:",
          "tests/test_doctor.py"),
    # --- the engine -----------------------------------------------------------------------------
    Fault("a traced part is called by names that its graph does not have", "engine/host.py",
          "return graph.forward(*arguments.tensors)  #", "return graph.forward(*args, **kwargs)  #",
          "tests/test_engine_arguments.py"),
    Fault("a graph runs with another value than it was traced with", "engine/arguments.py",
          "    return type(value), value\n", "    return type(value)\n",
          "tests/test_engine_arguments.py"),
    Fault("a traced value is no tensor to the forward that asks", "engine/tracing.py",
          "or (type(value) in proxies and issubclass(Tensor, kinds))",
          "",
          "tests/test_engine_arguments.py -k asks"),
    Fault("a write to a buffer happens while it is traced, and never again", "engine/tracing.py",
          "proxy_buffer_attributes = True", "proxy_buffer_attributes = False",
          "tests/test_engine_effects.py -k whole"),
    Fault("a change that tracing makes in attributes stays", "engine/tracing.py",
          "            attributes.restore()\n", "            pass\n",
          "tests/test_engine_effects.py -k 'effects and Keep'"),
    Fault("a forward that keeps a value in an attribute is traced", "engine/tracing.py",
          "return f\"changes {change.attribute!r}\"", "continue",
          "tests/test_engine_effects.py -k 'effects and Append'"),
    Fault("a model output becomes a dictionary in a sparse phase", "engine/tracing.py",
          "if isinstance(a, dict | list) and type(a) not in _CONTAINERS:", "if False:",
          "tests/test_engine_arguments.py -k output"),
    Fault("the engine's choices are not saved", "engine/engine.py",
          "choices = {name: asdict(c) for name, c in self.choices.items()}", "choices = {}",
          "tests/test_engine_life.py tests/test_train.py -k 'chosen or loaded or resuming'"),
    Fault("the memory of a gradient is not cleared", "engine/memory.py",
          "return reused.zero_().data", "return reused.data",
          "tests/test_kept.py tests/test_engine_life.py"),
    Fault("the memory of a gradient is given away while it is used", "engine/memory.py",
          "elif _users(reused) > 1:", "elif False:",
          "tests/test_kept.py tests/test_engine_life.py"),
    Fault("two live buffers share memory", "engine/memory.py",
          "s.last < slot.first or slot.last < s.first",
          "s.last <= slot.first or slot.last < s.first",
          "tests/test_engine.py"),
    Fault("the engine computes with stale index lists", "engine/plans.py",
          "        self._made.clear()\n", "",
          "tests/test_engine_life.py"),
    Fault("the engine computes in stale frames", "engine/memory.py",
          "        self._frames.clear()\n", "",
          "tests/test_engine_life.py"),
    Fault("the engine reads parameters at their old addresses", "engine/segment.py",
          "if pointers != self._pointers:", "if not self._pointers:",
          "tests/test_engine_life.py tests/test_engine.py"),
    Fault("a gradient that was added to is taken for the kernels' own", "engine/gradients.py",
          "            and grad._version == version\n", "",
          "tests/test_kept.py tests/test_engine_life.py"),
    Fault("an output that is used twice has half of its gradient", "engine/segment.py",
          "totals[slot] + grad if slot in totals else grad", "grad",
          "tests/test_engine.py tests/test_engine_random.py"),
    Fault("a much sparser network is not measured anew", "engine/choice.py",
          "stale = self.times_layers and not all(fits)", "stale = False",
          "tests/test_engine_life.py -k 'sparser'"),
    Fault("a state forgets the tiles of its layers", "engine/choice.py",
          "None if tiling is None else Tiling(**tiling)", "None",
          "tests/test_tiles.py -k 'resumed'"),
    Fault("small networks measure tiles", "engine/choice.py",
          "if work >= WORK else None", "if work >= 0 else None",
          "tests/test_tiles.py -k 'small'"),
    Fault("a tiling need not be clearly faster", "engine/tuning.py",
          "if times[best] * CLEAR < times[0] else start", "if times[best] < times[0] else start",
          "tests/test_tiles.py -k 'clearly'"),
    Fault("measuring tiles has no end", "engine/tuning.py",
          "if (began := clock()) > until:", "if (began := clock()) > 1e300:",
          "tests/test_tiles.py -k 'time_is_over'"),
    Fault("tiles of another machine count", "engine/tuning.py",
          'if value["machine"] != self.machine:', "if False:",
          "tests/test_tiles.py -k 'foreign'"),
    Fault("a second measurement replaces the first", "engine/tuning.py",
          "{name: tiling, **self.read()}", "{**self.read(), name: tiling}",
          "tests/test_tiles.py -k 'kept_in_a_file'"),
    Fault("a cache that CPUs share counts for each", "engine/caches.py",
          "sum(c.size for c in lasts) if lasts", "len(cpus) * max(c.size for c in lasts) if lasts",
          "tests/test_tiles.py -k 'those_of_the_cpus'"),
    Fault("a cache may have any size", "engine/caches.py",
          "if c.level == 1 and c.size in _FIRST]", "if c.level == 1]",
          "tests/test_tiles.py -k 'default'"),
    Fault("the tiling bounds no rows", "engine/tile.py",
          "    if rows is None:", "    if rows is None or rows > 0:",
          "tests/test_tiles.py -k 'bounds or rounding'"),
    Fault("a segment ignores the conversions at its ends", "engine/choice.py",
          "return sum(choice.gain_ms for choice in choices) > conversions_ms",
          "return sum(choice.gain_ms for choice in choices) > 0",
          "tests/test_engine_life.py tests/test_profile.py"),
    Fault("whole steps that lose stay on the engine", "engine/verdict.py",
          "return off if not best.is_slower_than(dense) else everything", "return off",
          "tests/test_verdict.py -k 'whatever or stays_off'"),
    Fault("a part that helps stays off", "engine/verdict.py",
          "if without.median < best.median:", "if True:",
          "tests/test_verdict.py -k 'helps or stays_off'"),
    Fault("one disturbed block of steps ends the engine", "engine/verdict.py",
          "best = faster(best, (yield frozenset()))", "yield frozenset()",
          "tests/test_verdict.py -k other_work"),
    Fault("the first steps after a change count", "engine/verdict.py",
          "tuple(self.times[IGNORED:])", "tuple(self.times)",
          "tests/test_verdict.py -k 'first_steps'"),
    Fault("the times of whole steps are not saved", "engine/engine.py",
          '"trials": self._judge.state()}', '"trials": {}}',
          "tests/test_verdict.py -k resumed"),
    Fault("a much sparser network keeps its verdict", "engine/engine.py",
          "                self._judge.forget()\n", "                pass\n",
          "tests/test_verdict.py -k sparser"),
    Fault("an evaluation is a part of the step after it", "engine/judge.py",
          "or step.host is None or (training and not step.training)", "or step.host is None",
          "tests/test_verdict.py -k gradients"),
    Fault("a batch of another size has the verdict of the first", "engine/judge.py",
          'return ", ".join([mode, f"about', 'return mode; ", ".join([mode, f"about',
          "tests/test_verdict.py -k another"),
    Fault("the optimizer keeps its short steps when all is off", "engine/judge.py",
          "return OPTIMIZER not in self._off(kind) and not self._is_dense(kind)", "return True",
          "tests/test_verdict.py -k 'loses'"),
    Fault("every process follows its own clock", "engine/judge.py",
          "trial = Trial.of(agree(trial.state()))", "trial = Trial.of(trial.state())",
          "tests/test_verdict.py -k processes"),
    Fault("a verdict is not on the disk before its step", "runs/train.py",
          "if stop or chosen or judged or", "if stop or chosen or",
          "tests/test_train.py -k 'verdict'"),
]  # fmt: skip


def copy_checkout(folder: Path) -> None:
    """Copy sources and tests into a folder; link everything else."""
    for name in ("src", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    skipped = {"src", "tests", "build", ".git", ".venv"}
    for path in ROOT.iterdir():
        if path.name not in skipped and not path.name.endswith("_cache"):
            (folder / path.name).symlink_to(path)
    # A build without the compiled kernels is tested without them.
    find = (
        "import importlib.util as u; s = u.find_spec('acdc._kernels'); print(s.origin if s else '')"
    )
    origin = subprocess.run(
        [sys.executable, "-c", find], capture_output=True, text=True, check=True, cwd=folder
    ).stdout.strip()
    if origin:
        (folder / PACKAGE / Path(origin).name).symlink_to(origin)
    (folder / "first").mkdir()
    (folder / "first" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    imported = Path(
        subprocess.run(
            [sys.executable, "-c", "import acdc; print(acdc.__file__)"],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            env=environment(folder),
        ).stdout.strip()
    )
    if not imported.is_relative_to(folder):
        sys.exit(f"The copy in {folder} is not the acdc that is imported, which is {imported}.")


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which the copy is imported."""
    threads = {"OMP_NUM_THREADS": "1"}
    # Python trusts compiled bytecode of the same second and size, and a fault may have both.
    path = os.pathsep.join([str(folder / "first"), str(folder / "src")])
    return os.environ | threads | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(folder: Path, tests: str) -> tuple[bool, str]:
    """Return whether the tests pass in a copy, and the first failure or another reason."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *shlex.split(tests)],
            cwd=folder,
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return False, f"a run of more than {TIMEOUT} seconds"
    if done.returncode == 0:
        return True, ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"pytest {tests}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return False, found[1]


def insert(fault: Fault, source: str) -> str:
    """Return the text of a source file with the fault.

    Raises:
        ValueError: The text that is to be replaced is not in the file exactly once.
    """
    count = source.count(fault.old)
    if count != 1:
        raise ValueError(f"{fault.name!r}: its text is {count} times in {fault.file}, not once")
    return source.replace(fault.old, fault.new)


def try_fault(folder: Path, fault: Fault) -> tuple[bool, str]:
    """Return whether the tests see a fault, and the test that does."""
    path = folder / PACKAGE / fault.file
    healthy = path.read_text("utf-8")
    path.write_text(insert(fault, healthy), "utf-8")
    try:
        passes, failure = run_tests(folder, fault.tests)
    finally:
        path.write_text(healthy, "utf-8")
    return not passes, failure


def main() -> int:
    """Try the faults and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults with one of these in their name")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--jobs", type=int, default=1, help="faults to try at a time")
    parser.add_argument("--control", action="store_true", help="run the tests without faults first")
    arguments = parser.parse_args()
    words = arguments.words
    chosen = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    if arguments.list:
        for fault in chosen:
            print(f"{fault.file:24} {fault.name}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(arguments.jobs):
            folder = Path(temporary).resolve() / str(number)
            folder.mkdir()
            copy_checkout(folder)
            copies.put(folder)

        def control(tests: str) -> None:
            folder = copies.get()
            passes, failure = run_tests(folder, tests)
            copies.put(folder)
            if not passes:
                print(f"fails without a fault: {failure} (pytest {tests})", flush=True)
                sick.append(tests)

        def attempt(fault: Fault) -> None:
            folder, began = copies.get(), time.monotonic()
            seen, failure = try_fault(folder, fault)
            copies.put(folder)
            missed.extend([] if seen else [fault.name])
            verdict = f"caught by {failure}" if seen else f"NOT CAUGHT by pytest {fault.tests}"
            seconds = time.monotonic() - began
            print(f"{fault.file}: {fault.name}: {verdict} ({seconds:.0f} s)", flush=True)

        missed: list[str] = []
        sick: list[str] = []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            if arguments.control:
                list(pool.map(control, dict.fromkeys(fault.tests for fault in chosen)))
            list(pool.map(attempt, chosen))
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults caught")
    return 1 if missed or sick else 0


if __name__ == "__main__":
    sys.exit(main())
