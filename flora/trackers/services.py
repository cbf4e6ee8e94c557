"""Trackers that are services, each with a mode that needs no network: Weights & Biases, MLflow, Trackio."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, ClassVar

from flora.core.errors import UserError
from flora.core.registry import option, register
from flora.trackers.base import Figures, Following, TrackedRun, Tracker, new_id, present

# How often MLflow asks a server that does not answer; by itself it goes on for minutes.
MAX_RETRIES = "3"
# Its limits: characters of a name, how long names and values may be, settings in one request.
_NOT_IN_NAMES = re.compile(r"[^\w\-./ ]")
MAX_NAME, MAX_VALUE, MAX_PARAMS = 250, 6000, 100


@register("wandb")
@dataclass(frozen=True)
class WeightsAndBiases(Tracker):
    """Weights & Biases. With `mode: offline` a folder wandb in the run directory, for `wandb sync` to send."""

    module: ClassVar[str | None] = "wandb"

    project: str = option("its project", "flora")
    entity: str | None = option("whose project it is; none: the account's own", None)
    mode: str | None = option(
        "none: as WANDB_MODE says, else online", None, choices=("online", "offline", "shared", "disabled")
    )
    group: str | None = option("the group that its runs belong to", None)
    tags: tuple[str, ...] = option("tags of the run", ())

    def follow(self, run: TrackedRun) -> Following:
        import wandb

        try:
            return _WandbFollowing(self, run)
        except wandb.errors.UsageError as error:  # no account, or an option that it refuses
            raise UserError(f"trackers: wandb: {' '.join(str(error).split())}") from None


class _WandbFollowing(Following):
    def __init__(self, options: WeightsAndBiases, run: TrackedRun) -> None:
        import wandb

        self.id, self.last_round = run.id or new_id(), run.last_round
        init: Any = wandb.init
        self._run: Any = init(
            project=options.project,
            entity=options.entity,
            mode=options.mode,
            group=options.group,
            tags=options.tags,
            id=self.id,
            name=run.name,
            dir=run.directory,
            config=dict(run.settings),
            resume="allow",
            reinit="create_new",  # runs of a sweep may be several in one process
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )

    def round(self, number: int, figures: Figures) -> None:
        self._run.log(present(figures), step=number)
        self.last_round = number

    def finish(self, figures: Mapping[str, Any]) -> None:
        self._run.summary.update({f"summary/{name}": value for name, value in figures.items() if value is not None})

    def close(self, *, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


@register("mlflow")
@dataclass(frozen=True)
class MLflow(Tracker):
    """MLflow: a server, or a database in a file that `mlflow ui` shows."""

    module: ClassVar[str | None] = "mlflow"

    tracking_uri: str | None = option(
        "where it keeps runs, such as sqlite:///mlflow.db or http://HOST:5000; none: as MLFLOW_TRACKING_URI says, else "
        "its default",
        None,
    )
    experiment: str = option("its experiment", "flora")

    def follow(self, run: TrackedRun) -> Following:
        from mlflow.exceptions import MlflowException

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", MAX_RETRIES)  # read when it asks
        for talkative in ("mlflow", "alembic"):
            logging.getLogger(talkative).setLevel(logging.WARNING)
        try:
            return _MLflowFollowing(self, run)
        except MlflowException as error:
            if error.get_http_status_code() >= 500:  # the server, not what it is asked for
                raise
            raise UserError(f"trackers: mlflow: {' '.join(str(error).split())}") from None


class _MLflowFollowing(Following):
    """Asks the store which rounds it has: it knows better than a process that was killed could note down."""

    def __init__(self, options: MLflow, run: TrackedRun) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=options.tracking_uri)
        if run.id is not None:
            self.id = run.id
            kept = self._client.get_run(run.id).data.metrics
            histories = [self._client.get_metric_history(run.id, name) for name in kept]
            self.last_round = max((point.step for history in histories for point in history), default=-1)
            self._client.update_run(run.id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(options.experiment)
        folder = self._client.create_experiment(options.experiment) if experiment is None else experiment.experiment_id
        self.id, self.last_round = self._client.create_run(folder, run_name=run.name).info.run_id, -1
        params = [Param(_mlflow_name(key), str(value)[:MAX_VALUE]) for key, value in run.settings.items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self.id, params=params[start : start + MAX_PARAMS])

    def round(self, number: int, figures: Figures) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(name), value, now, number) for name, value in present(figures).items()]
        self._client.log_batch(self.id, metrics=metrics)
        self.last_round = number

    def finish(self, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            self._client.set_tag(self.id, _mlflow_name(f"summary/{name}"), str(value)[:MAX_VALUE])

    def close(self, *, is_finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if is_finished else "FAILED")


def _mlflow_name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:MAX_NAME]


@register("trackio")
@dataclass(frozen=True)
class Trackio(Tracker):
    """Trackio: a database on this machine that `trackio show` shows, or a Space on Hugging Face."""

    module: ClassVar[str | None] = "trackio"

    project: str = option("its project", "flora")
    space: str | None = option("the Space that it is sent to, such as NAME/trackio; none: this machine", None)

    def follow(self, run: TrackedRun) -> Following:
        try:
            return _TrackioFollowing(self, run)
        except ValueError as error:
            raise UserError(f"trackers: trackio: {' '.join(str(error).split())}") from None


class _TrackioFollowing(Following):
    """It knows runs again by their names, so a run's gets an addition that no other has."""

    def __init__(self, options: Trackio, run: TrackedRun) -> None:
        import trackio

        self.id, self.last_round = run.id or f"{run.name}-{new_id()}", run.last_round
        with redirect_stdout(sys.stderr):  # standard output has the run's own result
            self._run: Any = trackio.init(
                options.project,
                self.id,
                space_id=options.space,
                config=dict(run.settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def round(self, number: int, figures: Figures) -> None:
        self._run.log(present(figures), step=number)
        self.last_round = number

    def close(self, *, is_finished: bool) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()
