"""The message contract: the Celery app, its queues and delivery settings, and how tickets are published.

A ticket says only "there is work on this queue". It carries no job and no shard: SQL decides what is done, so a ticket
may be lost, doubled or late without harm. Nothing relies on acknowledgement, redelivery or results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from celery import Celery
from celery.loaders.app import AppLoader
from kombu import Exchange, Queue

from storage.errors import BadInput, Misconfigured, Unavailable
from storage.settings import Settings, masked

TASK = "imagemill.work"
QUEUES = ("cpu", "gpu", "gpu-24g", "gpu-40g", "gpu-80g")  # by capability only; anything finer is decided by the claim
_PREFIX = "imagemill:"

# Twice the longest a ticket may run; only a janitor for messages of dead workers, never needed for correctness.
_VISIBILITY_S = 2 * 3600


def served_by(queue: str) -> tuple[str, ...]:
    """The queues that a worker of this capability consumes: its own and the less demanding ones of its kind."""
    if queue not in QUEUES:
        raise BadInput(f"unknown queue {queue!r}; known queues: {', '.join(QUEUES)}")
    return ("cpu",) if queue == "cpu" else QUEUES[1 : QUEUES.index(queue) + 1]


def servers_of(queue: str) -> tuple[str, ...]:
    """The capabilities whose workers consume this queue."""
    return tuple(name for name in QUEUES if queue in served_by(name))


class Loader(AppLoader):  # type: ignore[misc]
    """Imports as every program does. Celery's own looks into the current folder first, where a dataset may lie."""

    def import_from_cwd(self, module: str, imp: Any = None, package: str | None = None) -> Any:
        return self.import_module(module, package=package)


@lru_cache(maxsize=8)
def app(settings: Settings) -> Celery:
    """The Celery app of a broker. Making it opens no connection. Raises Misconfigured for a URL that cannot be."""
    _redis(settings).close()
    celery = Celery("imagemill", broker=settings.broker, loader=Loader, set_as_current=False)
    hard_s = settings.ticket_seconds + 2 * settings.stall_seconds
    celery.conf.update(
        # Messages: JSON, ids only, no result backend.
        accept_content=["json"],
        task_serializer="json",
        event_serializer="json",
        task_ignore_result=True,
        result_backend=None,
        task_queues=[Queue(name, Exchange(""), routing_key=name) for name in QUEUES],
        task_default_queue="cpu",
        task_create_missing_queues=False,
        # One ticket at a time, by a spawned child that may be killed.
        worker_pool="prefork",
        worker_concurrency=1,
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=120,
        worker_prefetch_multiplier=1,
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        task_retry_on_worker_lost=False,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        task_time_limit=hard_s,
        task_soft_time_limit=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        worker_eta_task_limit=10,
        # Reconnect for ever; publishing gives up soon, since the reconciler publishes again.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_pool_acquire_timeout=30,
        task_publish_retry=True,
        task_publish_retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 1},
        # Progress is asked of SQL, so no events and no chatter between workers.
        worker_send_task_events=False,
        task_send_sent_event=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_transport_options={
            "visibility_timeout": max(_VISIBILITY_S, int(2 * hard_s)),
            "socket_timeout": 20,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "global_keyprefix": _PREFIX,
            "priority_steps": [0],
            "queue_order_strategy": "round_robin",
        },
    )
    return celery


def load(settings: Settings) -> None:
    """Do now what the first ring would otherwise wait for, a fifth of a second; the broker need not be there yet."""
    import kombu.transport.redis  # noqa: F401

    for part in ("amqp", "tasks", "backend"):
        getattr(app(settings), part)


def publish(settings: Settings, queue: str, tickets: int) -> None:
    """Ring the bell `tickets` times. Raises Unavailable when the broker does not answer."""
    if queue not in QUEUES:
        raise BadInput(f"unknown queue {queue!r}; known queues: {', '.join(QUEUES)}")
    with _translated(settings), app(settings).producer_pool.acquire(block=True, timeout=10) as producer:
        for _ in range(tickets):
            app(settings).send_task(
                TASK, args=[queue], queue=queue, producer=producer, argsrepr="-", kwargsrepr="-", ignore_result=True
            )


def waiting(settings: Settings, queue: str) -> int:
    """How many tickets lie in the broker for a queue."""
    with client(settings) as redis:
        return int(redis.llen(_PREFIX + queue))


@contextlib.contextmanager
def client(settings: Settings) -> Iterator[Any]:
    """A redis-py client of the broker, for looking at queues. Foreign errors are translated."""
    redis = _redis(settings)
    with _translated(settings):
        try:
            yield redis
        finally:
            redis.close()


def _redis(settings: Settings) -> Any:
    from redis import Redis
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    url = settings.broker.replace("redis+socket://", "unix://").replace("virtual_host=", "db=")
    try:
        # One more try, at once: the library's own three with their pauses keep a user waiting for ten seconds.
        return Redis.from_url(url, socket_timeout=10, socket_connect_timeout=3, retry=Retry(ConstantBackoff(0.1), 1))
    except ValueError:
        raise Misconfigured(
            f"IMAGEMILL_BROKER_URL={masked(settings.broker)!r} is no Redis URL: expected redis://:password@host:6379/0"
        ) from None


def check(settings: Settings) -> str:
    """The broker's version. Raises Unavailable or Misconfigured with the remedy."""
    with client(settings) as redis:
        redis.ping()
        info = redis.info("server")
        return f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version')}"


@contextlib.contextmanager
def _translated(settings: Settings) -> Iterator[None]:
    from kombu.exceptions import KombuError, OperationalError
    from redis.exceptions import AuthenticationError, RedisError, ResponseError

    where = masked(settings.broker)
    try:
        yield
    except ResponseError as error:
        raise Unavailable(f"the broker {where} refused: {error}") from error
    except (RedisError, OperationalError, OSError) as error:
        if isinstance(error, AuthenticationError) or isinstance(error.__cause__, AuthenticationError):
            raise Misconfigured(
                f"the broker {where} refused the password: {error}; check IMAGEMILL_BROKER_URL"
            ) from error
        raise Unavailable(
            f"cannot reach the broker {where}: {error}; start Redis or Valkey there, or check IMAGEMILL_BROKER_URL"
        ) from error
    except KombuError as error:
        raise Unavailable(f"the broker {where} failed: {error}") from error
