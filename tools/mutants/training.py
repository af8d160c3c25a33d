"""Faults in configurations, evaluation while training, a run's records, and scores."""

CONFIG, RULES = "microdit_jax/training/config.py", "microdit_jax/training/rules.py"
DATA, TRAIN = "microdit_jax/training/data.py", "microdit_jax/train.py"
HELDOUT = "microdit_jax/training/evaluators/heldout_loss.py"
SAMPLES = "microdit_jax/training/evaluators/samples.py"
BASE, LIST = "microdit_jax/training/evaluators/base.py", "microdit_jax/training/evaluation.py"
PROGRESS, WRITER = "microdit_jax/training/progress.py", "microdit_jax/training/metric_writer.py"
REPORT, SET = "microdit_jax/training/report.py", "microdit_jax/evaluate/sample_set.py"
SCORES, RESULTS = "microdit_jax/evaluate/scores.py", "microdit_jax/evaluate/results.py"
STATISTICS, FRECHET = "microdit_jax/metrics/statistics.py", "microdit_jax/metrics/frechet.py"
SETS, FEATURES = "microdit_jax/metrics/feature_sets.py", "microdit_jax/metrics/features.py"
GOODPUT = "microdit_jax/training/goodput.py"
PROFILING = "microdit_jax/training/profiling.py"
DISTILL, TEST_DISTILL = "microdit_jax/training/distill.py", "tests/test_training_distill.py"

SOURCE, LORA = "microdit_jax/training/source.py", "microdit_jax/models/lora.py"

TEST_FINETUNE = "tests/test_training_finetune.py"
TEST_GOODPUT = "tests/test_training_goodput.py"
TEST_PROFILING = "tests/test_training_profiling.py"
TEST_CONFIG, TEST_TRAIN = "tests/test_training_config.py", "tests/test_train.py"
TEST_WRITER = "tests/test_training_metric_writer.py"
TEST_PROGRESS, TEST_REPORT = "tests/test_training_progress.py", "tests/test_training_report.py"
TEST_HELDOUT, TEST_SAMPLES = "tests/test_training_heldout_loss.py", "tests/test_training_samples.py"
TEST_EVALUATE, TEST_INPUTS = "tests/test_evaluate.py", "tests/test_evaluate_inputs.py"


def fault(name: str, file: str, old: str, new: str, *tests: str) -> dict:
    """An entry of MUTANTS."""
    return {"name": name, "file": file, "old": old, "new": new, "tests": list(tests)}


MUTANTS = [
    # ------------------------------------------------------------------ the held-out loss
    fault("every held-out noise sample has the same noise", HELDOUT,
          "number * self._noise_samples + i", "0", TEST_HELDOUT),
    fault("every batch of held-out images has the same noise", HELDOUT,
          "number * self._noise_samples + i", "i", TEST_HELDOUT),
    fault("held-out noise differs from run to run", HELDOUT,
          "seed=NOISE_SEED", "seed=int.from_bytes(__import__('os').urandom(3))",
          f"{TEST_HELDOUT}::test_the_noise_is_the_same_in_every_run"),
    fault("right and shuffled captions are swapped", HELDOUT,
          "self._captions: batch[captions]",
          'self._captions: batch[{"right": "shuffled", "shuffled": "right"}[captions]]',
          TEST_HELDOUT),
    fault("shuffled captions are the right ones", HELDOUT,
          "(row + half) % len(chosen)", "row", TEST_HELDOUT),
    fault("what fills a batch up counts", HELDOUT,
          "< batch.count", "< self._size", TEST_HELDOUT),
    fault("the loss by noise level takes the shuffled captions", HELDOUT,
          'np.divide(*totals["right"])', 'np.divide(*totals["shuffled"])', TEST_HELDOUT),
    fault("noise levels are a whole P_std apart", HELDOUT,
          "half + 1) / 2)", "half + 1))", TEST_HELDOUT),
    fault("held-out images are the first ones only", HELDOUT,
          "np.linspace(0, len(source) - 1, count).astype(int)", "np.arange(count)", TEST_HELDOUT),
    fault("the average is evaluated as the raw weights", HELDOUT,
          '{"raw": state.params}', '{"raw": state.ema or state.params}',
          f"{TEST_SAMPLES}::test_heldout_losses_of_both_kinds_of_weights"),
    fault("the raw weights are evaluated as the average", HELDOUT,
          '{"ema": state.ema}', '{"ema": state.params}',
          f"{TEST_SAMPLES}::test_heldout_losses_of_both_kinds_of_weights"),
    # ------------------------------------------------------------------ samples in training
    fault("raw weights are sampled though an average is kept", BASE,
          "state.params if state.ema is None else state.ema", "state.params", TEST_SAMPLES),
    fault("the grid ignores the run's seed", SAMPLES,
          "            seed=self._context.config.seed,\n", "            seed=0,\n", TEST_SAMPLES),
    fault("the grid ignores its guidance", SAMPLES,
          "guidance_scale=settings.guidance_scale,\n            num_inference_steps=settings."
          "num_inference_steps,\n            seed=self", "num_inference_steps=settings."
          "num_inference_steps,\n            seed=self", TEST_SAMPLES),
    fault("samples that fail end the run", SAMPLES,
          "except UserError as error:\n        say", "except KeyError as error:\n        say",
          TEST_SAMPLES),
    fault("a grid though none was asked for", LIST,
          "if switch is None or settings[switch]]", "]", TEST_SAMPLES),
    fault("the loss at a stage's start is left out", HELDOUT,
          "at_start = True", "at_start = False",
          f"{TEST_SAMPLES}::test_the_list_is_the_configs"),
    # ------------------------------------------------------------------ the loop
    fault("no evaluation after the last step", TRAIN,
          "evaluating = last or step %", "evaluating = step %",
          f"{TEST_TRAIN}::test_a_run_leaves_what_it_promises"),
    fault("no checkpoint after the last step", TRAIN,
          "saving = last or stopping or step", "saving = stopping or step",
          f"{TEST_TRAIN}::test_two_stages_as_one_run"),
    fault("a checkpoint before the step's records", TRAIN,
          "                progress.catch_up()\n            if evaluating and not stopping:",
          "                pass\n            if evaluating and not stopping:",
          f"{TEST_TRAIN}::test_a_run_leaves_what_it_promises"),
    fault("a chain starts though its second stage is bad", TRAIN,
          "    check(config)\n    with contextlib", "    with contextlib",
          f"{TEST_TRAIN}::test_a_chain_whose_second_stage_is_bad_does_not_start"),
    # ------------------------------------------------------------------ configurations
    fault("NaN as a learning rate", RULES, "math.isfinite(value) and low", "low", TEST_CONFIG),
    fault("a dataset's weight of zero", RULES, "not POSITIVE.holds(weight)",
          "not NOT_NEGATIVE.holds(weight)", TEST_CONFIG),
    fault("only the first stage of a chain is checked", CONFIG,
          "            _check_stage(config[name], None)\n",
          "            position or _check_stage(config[name], None)\n", TEST_CONFIG),
    fault("experts that the mesh does not divide", CONFIG, "if experts and cfg.num_experts %",
          "if False and cfg.num_experts %", TEST_CONFIG),
    fault("micro-batches that do not divide", CONFIG, "if share % wanted:", "if False:",
          TEST_CONFIG),
    fault("a stage that starts from a later one", CONFIG, "if source not in earlier:",
          "if False:", TEST_CONFIG),
    fault("another network than the stage before", CONFIG, "shapes[0][field] != shapes[1][field]",
          "False", TEST_CONFIG),
    fault("all micro-batches at once", CONFIG, "    return share // wanted\n", "    return 1\n",
          "tests/test_configs.py::test_arch_and_micro_batches"),
    # ------------------------------------------------------------------ data
    fault("the data of a run never drops captions", DATA, "caption_drop=config.data.caption_drop",
          "caption_drop=0.0", f"{TEST_CONFIG}::test_batches_follow_the_config"),
    fault("the data's order ignores the seed", DATA, "seed=config.seed", "seed=0",
          f"{TEST_CONFIG}::test_batches_follow_the_config"),
    fault("datasets' weights are ignored", DATA, "            self.weights,\n",
          "            None,\n", f"{TEST_CONFIG}::test_batches_follow_the_config"),
    fault("a resume begins with the first batch", DATA, "pipeline.batches(dataset, start,",
          "pipeline.batches(dataset, 0,", f"{TEST_CONFIG}::test_batches_follow_the_config"),
    # ------------------------------------------------------------------ records
    fault("metrics.jsonl keeps lines after the resumed step", WRITER,
          '["step"] <= step', '["step"]', TEST_WRITER),
    fault("metrics.jsonl loses the resumed step's line", WRITER,
          '["step"] <= step', '["step"] < step', TEST_WRITER),
    fault("an unfinished line stays", WRITER, 'split(b"\\n")[:-1]', 'split(b"\\n")',
          TEST_WRITER),
    fault("a resumed run forgets the losses since its last line", PROGRESS,
          'list(resumed.get("window", []))', "[]", TEST_PROGRESS),
    fault("waiting for data counts as nothing", PROGRESS,
          "self._waited += time", "self._waited = 0 * time", TEST_PROGRESS),
    fault("evaluations count as training time", PROGRESS,
          "self._since += time", "self._since += 0 * time", TEST_PROGRESS),
    fault("the page leaves out the last point", REPORT,
          'found["train"].append((line["step"], line["loss"]))',
          'found["train"] += [(line["step"], line["loss"])] * (line is not lines[1])',
          f"{TEST_REPORT}::test_series"),
    fault("the page shows the raw loss as the average's", REPORT,
          'losses = kinds.get("ema") or kinds.get("raw") or {}',
          'losses = kinds.get("raw") or {}', TEST_REPORT),
    fault("the page shows the first grids only", REPORT,
          "round(i * last / max(1, count - 1))", "i", TEST_REPORT),
    # ------------------------------------------------------------------ evaluation
    fault("a resumed set samples all again", SET, "if not self._is_done(c, measures)", "",
          TEST_EVALUATE),
    fault("each chunk starts from the first images' noise", SET, "indices=chunk.indices",
          "indices=range(len(chunk.prompts))", TEST_EVALUATE),
    fault("a set of other weights is taken for this one", SET, "if found.get(k) != self._identity",
          "if k != 'weights' and found.get(k) != self._identity", TEST_EVALUATE),
    fault("kept images of another prompt are measured", SET, "is_made_so(path, made)",
          "path.is_file()", TEST_EVALUATE),
    fault("an interval of the normal distribution", SCORES,
          "scipy.stats.t.ppf(0.975, len(numbers) - 1)", "1.96", TEST_INPUTS),
    fault("a one-sided interval", SCORES, "0.975", "0.95", TEST_INPUTS),
    fault("the table shows precision under recall's title", RESULTS,
          'row["scores"].get(name)', 'row["scores"].get(names[0])', TEST_EVALUATE),
    # ------------------------------------------------------------------ metrics
    fault("reference digests without the covariance", STATISTICS,
          "parts = (self.statistics.mean, self.statistics.covariance)",
          "parts = (self.statistics.mean,)", "tests/test_metrics_statistics.py"),
    fault("FID's covariance is biased", FRECHET, "(self.count - 1), self.count",
          "self.count, self.count", "tests/test_metrics_frechet.py"),
    fault("batches are merged without the distance of their means", FRECHET,
          " + np.outer(step, step) * (self.count * n / total)", "",
          "tests/test_metrics_frechet.py"),
    fault("KID with its diagonal", SETS, "k.sum() - np.trace(k)", "k.sum()",
          "tests/test_metrics_frechet.py"),
    fault("recall is precision", SETS, "_near(real, generated, NEIGHBOURS)",
          "_near(generated, real, NEIGHBOURS)", "tests/test_metrics_frechet.py"),
    fault("the name of FID's features leaves out the resizing", FEATURES, ",resize={mode}", "",
          "tests/test_metrics_features.py"),
    fault("CLIP score below zero", "microdit_jax/metrics/clip_score.py", "max(0.0, 100 *", "(100 *",
          "tests/test_metrics_clip_score.py"),
    # ------------------------------------------------------------------ students
    fault("a student's teacher is guided at all noise levels", DISTILL,
          "jnp.where((low < sigma) & (sigma <= high), self.guidance_scale, 1.0)",
          "jnp.where(sigma > 0, self.guidance_scale, 1.0)", TEST_DISTILL),
    fault("trajectories from noise alone begin at an image", DISTILL,
          "self.edm.sigma_max), 0 * latents", "self.edm.sigma_max), latents", TEST_DISTILL),
    fault("the teacher's trajectory is Euler's", DISTILL,
          "slope + _per_image(ratio) * (slope - last)", "slope", TEST_DISTILL),
    # ------------------------------------------------------------------ goodput, health, profiles
    fault("steps that are run again count as goodput", GOODPUT,
          'else "redone", *self._doing[1:]]', 'else "steps", *self._doing[1:]]', TEST_GOODPUT),
    fault("the time between two processes is forgotten", GOODPUT,
          'self._seconds["down"] += max(0.0, since - found.until)', "pass", TEST_GOODPUT),
    fault("an evaluation's time counts as its parts' and its own", GOODPUT,
          "self._change([*outer, kind])", "self._change([*outer, outer[-1]])", TEST_GOODPUT),
    fault("a workdir that was moved is made anew by the sums", GOODPUT,
          "self._begun and self._kept.exists()", "self._begun", TEST_GOODPUT),
    fault("the health file is written once", GOODPUT,
          "_sign(self._health, self._step, self._doing[-1])", "pass", TEST_GOODPUT),
    fault("a request of before the start is traced", PROFILING,
          "self._touched, self._looked = self._time_of_request(), clock()",
          "self._touched, self._looked = 0.0, clock()", TEST_PROFILING),
    fault("a signal traces for ever", PROFILING,
          "            self._signalled = False\n", "", TEST_PROFILING),
    # ------------------------------------------------------------------ fine-tuning
    fault("held-out records are trained on too", DATA,
          "if i not in held]", "]", TEST_FINETUNE),
    fault("a released checkpoint's noise levels are taken for every source", SOURCE,
          "noise if model.folder is not None else noise | RELEASED_NOISE", "noise | RELEASED_NOISE",
          f"{TEST_FINETUNE}::test_a_source_fills_in_what_is_left_open"),
    fault("new adapters change the network", LORA,
          "jnp.zeros((self.rank, columns))", "jnp.ones((self.rank, columns))",
          f"{TEST_FINETUNE}::test_new_adapters_change_nothing_and_learn_at_once"),
    fault("adapters are not scaled", LORA,
          "self.alpha / self.rank * product", "product",
          f"{TEST_FINETUNE}::test_adapters_are_low_rank_sums"),
    fault("adapters are merged into any weights", "microdit_jax/checkpoints/weights.py",
          "if weights_digest(params) != adapted.weights:", "if False:",
          f"{TEST_FINETUNE}::test_adapters_as_a_run"),
]  # fmt: skip
