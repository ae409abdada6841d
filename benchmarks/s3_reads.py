"""How fast boto3 and obstore read objects from a SeaweedFS on this machine: why storage/s3.py reads through obstore.

Run from the repository: .venv/bin/python benchmarks/s3_reads.py
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.services import SeaweedFS

OBJECTS, SIZE, THREADS, ROUNDS = 200, 100_000, 16, 9


def main() -> None:
    with SeaweedFS() as server, ThreadPoolExecutor(THREADS) as pool:
        os.environ.update(server.environment)
        bucket = server.new_bucket()
        client = server.client(max_pool_connections=2 * THREADS)
        keys = [f"images/{number:04d}.jpg" for number in range(OBJECTS)]
        list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=os.urandom(SIZE)), keys))
        readers = {
            "boto3": lambda key: client.get_object(Bucket=bucket, Key=key)["Body"].read(),
            "obstore": obstore_reader(bucket),
            "storage.s3": store_reader(bucket),
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(ROUNDS + 1):
            for name, read in readers.items():
                rate = objects_a_second(pool, read, keys)
                if turn:  # the first round opens the connections
                    rates[name].append(rate)
    report(rates)


def obstore_reader(bucket: str) -> Callable[[str], bytes]:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        bucket,
        endpoint=os.environ["IMAGEMILL_S3_ENDPOINT_URL"],
        region=os.environ["AWS_DEFAULT_REGION"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return lambda key: bytes(obstore.get(store, key).bytes())


def store_reader(bucket: str) -> Callable[[str], bytes]:
    from storage import objects
    from storage.settings import Settings

    settings = Settings()
    return lambda key: objects.read(f"s3://{bucket}/{key}", settings)


def objects_a_second(pool: ThreadPoolExecutor, read: Callable[[str], bytes], keys: list[str]) -> float:
    start = time.perf_counter()
    if any(len(data) != SIZE for data in pool.map(read, keys)):
        raise SystemExit("a reader returned other bytes than were written")
    return len(keys) / (time.perf_counter() - start)


def report(rates: dict[str, list[float]]) -> None:
    print(f"{OBJECTS} objects of {SIZE // 1000} KB, {THREADS} threads, {ROUNDS} rounds each, interleaved")
    base = statistics.median(rates["boto3"])
    for name, found in rates.items():
        median = statistics.median(found)
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"{name:<11} median {median:6.0f} objects/s ({spread}), {median / base:.2f} x boto3")


if __name__ == "__main__":
    main()
