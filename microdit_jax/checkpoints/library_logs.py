"""Logging of Orbax about failed saves: pages of tracebacks, of an error that it also raises."""

import logging


def drop_tracebacks_of_orbax() -> None:
    """Leaves out what Orbax logs with a traceback; the error itself becomes one line (`run`)."""
    logger = logging.getLogger("absl")
    if _is_kept not in logger.filters:
        logger.addFilter(_is_kept)


def _is_kept(record: logging.LogRecord) -> bool:
    """Returns False for a record to be left out."""
    return not (record.exc_info and "/orbax/" in record.pathname.replace("\\", "/"))
