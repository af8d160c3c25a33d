"""A student in seconds: --config=tests/support/tiny_student.py:TEACHER, a tiny run."""

from configs import distill


def get_config(teacher: str):
    """Returns the config of students, shrunk, with a line each step and no samples."""
    config = distill.get_config()
    config.teacher = teacher
    config.train.update(steps=4, batch_size=8, log_every=1, eval_every=1000, keep_last=3)
    config.distill.trajectory_steps = 2
    config.optim.update(warmup_steps=1, decay_steps=10)
    config.eval.update(num_samples=0, num_inference_steps=2)
    config.log.tensorboard = False
    return config
