"""python tests/object_storage.py PORT: gs://bucket of a Cloud Storage that is a process here."""

import sys
import threading
from typing import Any

from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

plain = objects.download


def download(request: Any, response: Any, storage: Any, *args: Any, **named: Any) -> None:
    """Cloud Storage tells an object's generation in a header, which TensorStore asks for."""
    plain(request, response, storage, *args, **named)
    if response.status.value < 300:
        held = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = storage.get_file_obj(*held)["generation"]


if __name__ == "__main__":
    objects.download = download
    create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
    print("ready", flush=True)
    threading.Event().wait()
