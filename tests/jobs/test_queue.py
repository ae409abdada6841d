"""Tickets: what a message holds, the settings that keep delivery harmless, and errors of the broker in one line."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from jobs import queue
from storage.errors import BadInput, Misconfigured, Unavailable
from storage.settings import Settings
from tests.faultproxy import FaultProxy
from tests.services import HOST, Valkey, free_ports
from tests.times import soon

# reliability: which value each setting must have, and why is said in jobs/queue.py.
CONF: dict[str, Any] = {
    "accept_content": ["json"],
    "task_serializer": "json",
    "event_serializer": "json",
    "task_ignore_result": True,
    "result_backend": None,
    "worker_pool": "prefork",
    "worker_concurrency": 1,
    "worker_pool_start_method": "spawn",
    "worker_proc_alive_timeout": 120,
    "worker_prefetch_multiplier": 1,
    "task_acks_late": True,
    "task_reject_on_worker_lost": False,
    "task_retry_on_worker_lost": False,
    "task_acks_on_failure": True,
    "task_acks_on_timeout": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_enable_prefetch_count_reduction": False,
    "worker_eta_task_limit": 10,
    "worker_send_task_events": False,
    "task_send_sent_event": False,
    "task_create_missing_queues": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_channel_error_retry": True,
    "broker_pool_acquire_timeout": 30,
}
TRANSPORT: dict[str, Any] = {
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "global_keyprefix": "imagemill:",
    "priority_steps": [0],
    "queue_order_strategy": "round_robin",
}


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """Settings with a real, empty broker."""
    return Settings(broker_url=broker_url)


def messages(settings: Settings, name: str) -> list[dict[str, Any]]:
    """The tickets that lie in the broker for a queue."""
    with queue.client(settings) as redis:
        return [json.loads(raw) for raw in redis.lrange(f"imagemill:{name}", 0, -1)]


@pytest.mark.parametrize("name", CONF)
def test_setting(name: str) -> None:
    assert queue.app(Settings(broker_url="redis://h/0")).conf[name] == CONF[name]


@pytest.mark.parametrize("name", TRANSPORT)
def test_transport_option(name: str) -> None:
    options = queue.app(Settings(broker_url="redis://h/0")).conf.broker_transport_options
    assert options[name] == TRANSPORT[name]


def test_times_follow_the_settings() -> None:
    conf = queue.app(Settings(broker_url="redis://h/0", ticket_seconds=5000, stall_seconds=1000)).conf
    options = conf.broker_transport_options
    assert conf.task_time_limit > 5000 + 1000
    assert options["visibility_timeout"] >= 2 * conf.task_time_limit
    assert 15 <= options["socket_timeout"] <= 30
    assert "retry_on_timeout" not in options
    assert "sep" not in options
    assert conf.task_publish_retry_policy["max_retries"] <= 3
    short = queue.app(Settings(broker_url="redis://h/0", ticket_seconds=1, stall_seconds=1)).conf
    assert short.broker_transport_options["visibility_timeout"] >= 3600


def test_queues_are_declared_by_capability() -> None:
    conf = queue.app(Settings(broker_url="redis://h/0")).conf
    assert [q.name for q in conf.task_queues] == list(queue.QUEUES)
    assert not any(":" in name for name in queue.QUEUES)


def test_a_ticket_says_only_which_queue(settings: Settings) -> None:
    queue.publish(settings, "gpu", 1)
    (message,) = messages(settings, "gpu")
    args, kwargs, embedded = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == (["gpu"], {})
    assert all(value is None for value in embedded.values())
    headers = message["headers"]
    assert message["content-type"] == "application/json"
    assert headers["task"] == queue.TASK
    assert (headers["argsrepr"], headers["kwargsrepr"]) == ("-", "-")
    assert headers["eta"] is None
    assert headers["ignore_result"] is True
    assert len(json.dumps(message)) < 1500


def test_tickets_are_counted_where_they_are(settings: Settings) -> None:
    assert queue.waiting(settings, "cpu") == 0
    queue.publish(settings, "cpu", 7)
    queue.publish(settings, "gpu-40g", 2)
    queue.publish(settings, "cpu", 0)
    assert {name: queue.waiting(settings, name) for name in queue.QUEUES} == {
        **dict.fromkeys(queue.QUEUES, 0),
        "cpu": 7,
        "gpu-40g": 2,
    }


def test_publishing_is_fast(settings: Settings) -> None:
    queue.publish(settings, "cpu", 1)
    started = time.monotonic()
    queue.publish(settings, "cpu", 200)
    print(f"\n200 tickets in {time.monotonic() - started:.2f} s")
    assert queue.waiting(settings, "cpu") == 201
    assert soon(time.monotonic() - started, 10)


def test_what_is_loaded_before_needs_no_loading_at_the_first_ring(broker_url: str) -> None:
    """Libraries of a fifth of a second, in a process that has not rung yet."""
    code = """
import sys
from jobs import queue
from storage.settings import Settings

settings = Settings(broker_url=sys.argv[1])
queue.load(settings)
before = set(sys.modules)
queue.publish(settings, "cpu", 1)
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    done = subprocess.run([sys.executable, "-P", "-c", code, broker_url], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - sys.stdlib_module_names <= {"celery", "kombu"}


def test_unknown_queues(settings: Settings) -> None:
    for name in ("gpus", "", "CPU", "gpu:sam"):
        with pytest.raises(BadInput, match="known queues: cpu"):
            queue.publish(settings, name, 1)
        with pytest.raises(BadInput, match="known queues: cpu"):
            queue.served_by(name)


@pytest.mark.parametrize("name", queue.QUEUES)
def test_who_serves_whom(name: str) -> None:
    assert name in queue.served_by(name)
    assert all(name in queue.served_by(other) for other in queue.servers_of(name))
    assert ("cpu" in queue.served_by(name)) == (name == "cpu")
    assert set(queue.served_by("gpu")) <= set(queue.served_by("gpu-80g"))


def test_a_unix_socket(valkey: Valkey) -> None:
    url = f"redis+socket://:{valkey.password}@{valkey.socket}?virtual_host=4000"
    settings = Settings(broker_url=url)
    assert queue.check(settings).startswith(("valkey", "redis"))
    queue.publish(settings, "cpu", 2)
    assert queue.waiting(settings, "cpu") == 2
    with queue.client(settings) as redis:
        redis.flushdb()


def test_check_names_the_server(settings: Settings) -> None:
    assert queue.check(settings).split()[1][0].isdigit()


def complaint(settings: Settings, kind: type[Exception], seconds: float = 20) -> None:
    """Each way to ask the broker fails with this error: one line, in bounded time, without the password."""
    asks: list[Callable[[], object]] = [
        lambda: queue.check(settings),
        lambda: queue.waiting(settings, "cpu"),
        lambda: queue.publish(settings, "cpu", 3),
    ]
    for ask in asks:
        started = time.monotonic()
        with pytest.raises(kind) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert "s3cr3t" not in str(caught.value)
        assert time.monotonic() - started < seconds


def test_nobody_listens() -> None:
    (port,) = free_ports(1)
    complaint(Settings(broker_url=f"redis://:s3cr3t@{HOST}:{port}/0"), Unavailable)


def test_wrong_password(valkey: Valkey) -> None:
    complaint(Settings(broker_url=f"redis://:s3cr3t@{HOST}:{valkey.port}/0"), Misconfigured)


def test_no_password(valkey: Valkey) -> None:
    complaint(Settings(broker_url=f"redis://{HOST}:{valkey.port}/0"), Misconfigured)


def test_a_broker_that_takes_no_more(broker_url: str) -> None:
    with Valkey("--maxmemory", "1") as full, pytest.raises(Unavailable):
        queue.publish(Settings(broker_url=full.url), "cpu", 1)


def test_a_broker_that_comes_back(valkey: Valkey) -> None:
    with FaultProxy(valkey.port) as proxy:
        settings = Settings(broker_url=f"redis://:{valkey.password}@{HOST}:{proxy.port}/3999")
        queue.publish(settings, "cpu", 1)
        proxy.refuse()
        proxy.reset()
        with pytest.raises(Unavailable):
            queue.publish(settings, "cpu", 1)
        proxy.heal()
        queue.publish(settings, "cpu", 1)
        assert queue.waiting(settings, "cpu") == 2
        with queue.client(settings) as redis:
            redis.flushdb()


def test_urls_that_cannot_be() -> None:
    for url in ("http://h", "nonsense", "redis://:s3cr3t@h:port/0"):
        with pytest.raises(Misconfigured) as caught:
            queue.check(Settings(broker_url=url))
        assert "s3cr3t" not in str(caught.value)
        with pytest.raises((Misconfigured, Unavailable)):
            queue.publish(Settings(broker_url=url), "cpu", 1)
