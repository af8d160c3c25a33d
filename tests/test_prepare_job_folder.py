"""Folders of long jobs: one job to a folder, however many processes begin at once."""

import threading

import pytest

from microdit_jax.errors import UserError
from microdit_jax.files import atomic_folder
from microdit_jax.prepare import job_folder


def begun_together(folder, requests):
    """What each of as many threads got: nothing, or its error; each writes a part right away."""
    barrier, errors = threading.Barrier(len(requests)), [None] * len(requests)

    def begin(number):
        barrier.wait()
        try:
            job_folder.begin(folder, requests[number])
            (folder / f"{number:06}.partial").mkdir()
        except Exception as error:
            errors[number] = error

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_processes_that_begin_together_share_a_folder(tmp_path):
    for trial in range(50):
        assert begun_together(tmp_path / str(trial), [{"seed": 1}] * 6) == [None] * 6


def test_of_different_jobs_that_begin_together_one_goes_on(tmp_path):
    for trial in range(50):
        errors = begun_together(tmp_path / str(trial), [{"seed": i} for i in range(6)])
        assert errors.count(None) == 1
        assert all("begun with other settings" in str(error) for error in errors if error)


def test_a_killed_start_and_a_disk_without_hard_links_are_no_obstacle(tmp_path, monkeypatch):
    def link(*paths):
        raise PermissionError

    monkeypatch.setattr("os.link", link)
    (tmp_path / ".job.json.7.partial").write_text("{")
    job_folder.begin(tmp_path, {"seed": 1})
    job_folder.begin(tmp_path, {"seed": 1})
    with pytest.raises(UserError, match="seed=1, now 2"):
        job_folder.begin(tmp_path, {"seed": 2})


def test_a_job_that_finished_nothing_may_be_deleted(tmp_path):
    job_folder.begin(tmp_path, {"seed": 1})
    with pytest.raises(ValueError), atomic_folder(tmp_path / "000000"):
        raise ValueError
    with pytest.raises(UserError, match="seed=1, now 2; .* nothing is finished there: delete it"):
        job_folder.begin(tmp_path, {"seed": 2})
    with atomic_folder(tmp_path / "000000"):
        pass
    with pytest.raises(UserError, match="choose another folder$"):
        job_folder.begin(tmp_path, {"seed": 2})


def test_files_in_place_of_folders_and_damage_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="could not write .* choose a place you may write to"):
            job_folder.begin(folder, {})
    for text in ("{", "[]"):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(UserError, match="expected a job in .* found damage"):
            job_folder.begin(tmp_path, {})
