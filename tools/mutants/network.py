"""Faults in the sampler, the network and the shardings."""

DIFFUSION, SHARDING = "microdit_jax/diffusion.py", "microdit_jax/sharding.py"
MOE, DIT = "microdit_jax/models/moe.py", "microdit_jax/models/dit.py"
SOLVERS = "microdit_jax/sampling/solvers.py"
SCHEDULES = "microdit_jax/sampling/schedules.py"
MASKING = "microdit_jax/models/masking.py"
NORMS, LAYERS = "microdit_jax/models/norms.py", "microdit_jax/models/layers.py"
MATMULS = "microdit_jax/models/matmuls.py"

UPDATE = "tests/test_training_update.py"

MUTANTS = [
    # ------------------------------------------------------------------ norms
    {
        "name": "norms in float32 take their variance from sums of squares",
        "file": NORMS,
        "old": "if jnp.dtype(dtype) == jnp.float32:",
        "new": "if dtype == jnp.float32:",
        "tests": ["tests/test_norms.py::test_float32_subtracts_the_mean_before_it_squares"],
    },
    {
        "name": "gradients of weights are rounded to the type of the matmuls",
        "file": MATMULS,
        "old": "((rows, rows), ((), ())), preferred_element_type=w.dtype)",
        "new": "((rows, rows), ((), ()))).astype(w.dtype)",
        "tests": ["tests/test_norms.py::test_weights_in_float32_get_gradients_in_float32"],
    },
    {
        "name": "the scale that a matrix takes is lost",
        "file": LAYERS,
        "old": "kernel = matmuls.scaled_matrix(kernel, scale, dtype)",
        "new": "kernel = matmuls.scaled_matrix(kernel, 0 * scale + 1, dtype)",
        "tests": ["tests/test_norms.py::test_a_scale_that_the_matrix_takes"],
    },
    # ------------------------------------------------------------------ the sampler
    {
        "name": "the sampler starts at the default sigma_max",
        "file": SOLVERS,
        "old": "np.float32(config.sigma_max)",
        "new": "np.float32(80)",
        "tests": ["tests/test_diffusion.py::test_start_and_evaluations_follow_the_config"],
    },
    {
        "name": "the sampler's levels ignore rho",
        "file": SCHEDULES,
        "old": "** config.rho, 0.0)",
        "new": "** 7, 0.0)",
        "tests": ["tests/test_diffusion.py::test_sampler_is_algorithm_1"],
    },
    {
        "name": "the sampler never corrects",
        "file": SOLVERS,
        "old": "        if following > 0:\n            corrector",
        "new": "        if False:\n            corrector",
        "tests": ["tests/test_diffusion.py::test_sampler_is_algorithm_1"],
    },
    {
        "name": "a correction forgets the first slope",
        "file": SOLVERS,
        "old": "[0.5, 0.5]",
        "new": "[1.0, 0.0]",
        "tests": ["tests/test_diffusion.py::test_sampler_is_algorithm_1"],
    },
    {
        "name": "outputs of earlier evaluations are taken in the other order",
        "file": SOLVERS,
        "old": "slope), state.last, state.before",
        "new": "slope), state.before, state.last",
        "tests": ["tests/test_sampling_solvers.py::test_a_solver_is_its_textbook_form"],
    },
    {
        "name": "UniPC is not corrected",
        "file": SOLVERS,
        "old": "keeps_denoised=True, restarts=i == 0)",
        "new": "keeps_denoised=True, restarts=True)",
        "tests": ["tests/test_sampling_solvers.py::test_a_solver_is_that_of_diffusers"],
    },
    # ------------------------------------------------------------------ the network
    {
        "name": "the gate's weights are rounded to bfloat16",
        "file": MOE,
        "old": "[rounded, w - rounded]",
        "new": "[rounded, 0 * w]",
        "tests": ["tests/test_moe.py"],
    },
    {
        "name": "the gate gets no gradient",
        "file": MOE,
        "old": "return dout.astype(out.dtype), dweight, None",
        "new": "return dout.astype(out.dtype), 0 * dweight, None",
        "tests": ["tests/test_moe.py"],
    },
    {
        "name": "experts take one token too many",
        "file": MOE,
        "old": "return int(capacity * t / e)",
        "new": "return round(capacity * t / e)",
        "tests": ["tests/test_moe.py"],
    },
    {
        "name": "depth_init is ignored",
        "file": DIT,
        "old": "i + 1 if cfg.depth_init else cfg.depth",
        "new": "i + 1",
        "tests": ["tests/test_dit.py::test_depth_init_decides_how_blocks_start"],
    },
    {
        "name": "the gate's weights are cast before they travel",
        "file": "microdit_jax/models/weights.py",
        "old": ', "adaLN_modulation_1", "gate")',
        "new": ', "adaLN_modulation_1")',
        "tests": ["tests/test_dit.py::test_matrices_that_multiply_in_float32_are_not_cast"],
    },
    {
        "name": "the number of kept tokens is rounded to the nearest",
        "file": MASKING,
        "old": "kept = int(t * (1 - mask_ratio))",
        "new": "kept = round(t * (1 - mask_ratio))",
        "tests": ["tests/test_masking.py"],
    },
    {
        "name": "the tokens with the largest noise are kept",
        "file": MASKING,
        "old": "jnp.argsort(noise, axis=1)",
        "new": "jnp.argsort(-noise, axis=1)",
        "tests": ["tests/test_masking.py"],
    },
    {
        "name": "restored tokens stay in shuffled order",
        "file": MASKING,
        "old": "return _rows(padded, ids_restore)",
        "new": "return padded",
        "tests": ["tests/test_masking.py"],
    },
    # ------------------------------------------------------------------ the shardings
    {
        "name": "gradients are summed in bfloat16",
        "file": SHARDING,
        "old": "psum_scatter(jnp.float32(grad), axis",
        "new": "psum_scatter(grad, axis",
        "tests": ["tests/test_sharding.py::test_gradients_are_summed_in_float32"],
    },
    {
        "name": "gradients of experts are summed over the expert axis too",
        "file": SHARDING,
        "old": "a for a in mesh.axis_names if a not in used and",
        "new": 'a for a in mesh.axis_names if a != "fsdp" and',
        "tests": ["tests/test_sharding.py::test_gathered_and_summed_inside_shard_map"],
    },
    {
        "name": "weights are gathered inside a slice before they are across",
        "file": SHARDING,
        "old": "for axis in reversed(split)",
        "new": "for axis in split",
        "tests": ["tests/test_sharding.py::test_gathered_and_summed_inside_shard_map"],
    },
    {
        "name": "the norm counts every copy of a weight",
        "file": SHARDING,
        "old": ".sum() / copies",
        "new": ".sum()",
        "tests": [UPDATE],
    },
    {
        "name": "weights travel before they are cast",
        "file": SHARDING,
        "old": "shards = shards if cast is None else cast(shards)",
        "new": "",
        "tests": ["tests/test_sharding.py::test_on_each_device_gathers_weights_and_splits_rows"],
    },
    {
        "name": "each device counts its images from 0",
        "file": SHARDING,
        "old": "np.arange(local, dtype=np.int32)",
        "new": "np.zeros(local, dtype=np.int32)",
        "tests": ["tests/test_sharding.py::test_put_batch"],
    },
]
