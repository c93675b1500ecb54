"""`jsublim run` on a digits config, from the config to the report. What is whole is not made again."""

from __future__ import annotations

import datetime
import hashlib
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console

from jsublim.core.files import read_table, write_json, write_table
from jsublim.core.section import identity
from jsublim.digits.config import Digits
from jsublim.digits.experiment import arms, read_digits, records
from jsublim.digits.report import print_summary, write_report
from jsublim.pipeline.results import check_folder, claim_folder, run_folder
from jsublim.pipeline.store import Artifact, Output, Store, device, digest, versions
from jsublim.runtime.programs import counting_programs

_WHO = [("seed", pa.int64()), ("condition", pa.string()), ("images", pa.string())]
_TRAINING = [("step", pa.int64()), ("loss", pa.float64())]
SCHEMAS = {
    "records": pa.schema([*_WHO, ("accuracy", pa.float64())]),
    "curves": pa.schema([*_WHO, *_TRAINING, ("accuracy", pa.float64())]),
}


def run_digits(spec: Digits, console: Console) -> Path:
    """Train and measure every network, then the report and its summary on the terminal. Returns the report's path."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    data = read_digits(spec.test_share, spec.split_seed)
    split = hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in data)).hexdigest()[:12]
    inputs = identity(spec) | {"data": split}
    key = digest(inputs)
    check_folder(spec)
    store, output = Store.of(spec, console.print), Output("digits", spec.name, inputs)
    store.keep_programs()
    told = f"{spec.name}: another process is making it; waiting"
    waits = store.locked([run_folder(spec), output], lambda: console.print(told))
    with counting_programs(console.print), waits:
        claim_folder(spec, key, console)
        store.mend([output])
        artifact = store.open(output)
        if not artifact.done:
            students = len(spec.seeds) * len(arms(spec.students))
            console.print(f"{len(spec.seeds)} teachers and {students} students, one program")
            begin = time.perf_counter()
            for name, rows in zip(("records", "curves"), records(spec, data), strict=True):
                write_table(artifact.path / f"{name}.parquet", rows, SCHEMAS[name])
            artifact.finish({"started": started, "seconds": {"run": round(time.perf_counter() - begin, 2)}})
        _gather(artifact, spec, len(data.test_NP), key)
        report = write_report(spec.run_dir)
        print_summary(spec.run_dir, console)
    return report


def _gather(artifact: Artifact, spec: Digits, test_images: int, key: str) -> None:
    """Write `results/`."""
    results = spec.run_dir / "results"
    results.mkdir(parents=True, exist_ok=True)
    for source, name in (("records", "results"), ("curves", "training")):
        write_table(results / f"{name}.parquet", read_table(artifact.path / f"{source}.parquet"), SCHEMAS[source])
    about = {
        "name": spec.name,
        "kind": spec.kind,
        "data_hash": artifact.inputs["data"],
        "config_hash": key,
        "versions": versions() | {"scikit-learn": metadata.version("scikit-learn")},
        "device": device(),
        "test_images": test_images,
        "config_yaml": spec.yaml(),
    }
    write_json(results / "run.json", about | artifact.summary)
