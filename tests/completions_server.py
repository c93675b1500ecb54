"""A server of completions in a process of its own: a checkpoint under `transformers`, asked as vLLM or SGLang are.

    python completions_server.py FOLDER PORT

It knows the fields that vLLM and SGLang document for `/v1/completions`, and refuses others. Adapters are PEFT folders.
A test changes how it behaves by `POST /behave` with some of `PLAIN`'s keys, and reads by `GET /seen` what was asked since.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import transformers

FIELDS = {
    "model", "prompt", "max_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "n", "stop_token_ids", "ignore_eos", "skip_special_tokens", "return_token_ids",
}  # fmt: skip
PLAIN = {
    "engine": "vllm", "name": "served", "text": False,  # says no token ids
    "loads": True,  # adapters
    "miscount": 0,  # as if its template added tokens
    "max_model_len": 256,
    "fail": [],  # what goes wrong with the next completions: 429, 500, cut (the connection), garbage, die
}  # fmt: skip


class Model:
    """The checkpoint, alone or with an adapter; one answer at a time."""

    def __init__(self, folder: Path):
        self.folder, self.lock, self.adapters = folder, threading.Lock(), {}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.base = self.read()

    def read(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def load(self, name, folder):
        from peft import PeftModel  # takes seconds

        self.adapters[name] = PeftModel.from_pretrained(self.read(), folder).eval()

    def answer(self, name, body):
        """The tokens drawn, the one that ends the row included."""
        model, prompt = self.adapters.get(name, self.base), torch.tensor([body["prompt"]])
        ends = body["stop_token_ids"] + ([] if body["ignore_eos"] else [self.tokenizer.eos_token_id])
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if body["temperature"]:
            how = {"do_sample": True, "temperature": body["temperature"], "top_p": body["top_p"]}
            how["top_k"] = max(body["top_k"], 0)
        how |= {"repetition_penalty": body["repetition_penalty"], "eos_token_id": ends or None, "pad_token_id": 0}
        with self.lock, torch.no_grad():
            torch.manual_seed(body["seed"])
            out = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=body["max_tokens"], **how
            )
        return out[0, prompt.shape[1] :].tolist()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        how, model = self.server.how, self.server.model
        card = {"id": how["name"], "owned_by": how["engine"], "root": str(model.folder)}
        card["max_model_len"] = how["max_model_len"]
        pages = {
            "/v1/models": {"data": [card, *({"id": name, "owned_by": how["engine"]} for name in model.adapters)]},
            "/version" if how["engine"] == "vllm" else "/get_server_info": {"version": "1.2.3"},
            "/seen": self.server.seen,
        }
        self.reply(*((200, pages[self.path]) if self.path in pages else (404, {"detail": "Not Found"})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        how = self.server.how
        base = "" if how["engine"] == "sglang" else "/v1"
        if self.path == "/behave":
            self.server.how, self.server.seen = PLAIN | body, []
            self.reply(200, {})
        elif self.path == "/v1/completions":
            with self.server.lock:
                self.server.seen.append(body)
                failure = how["fail"].pop(0) if how["fail"] else None
            self.fail(failure) if failure else self.complete(body)
        elif how["loads"] and self.path in (f"{base}/load_lora_adapter", f"{base}/unload_lora_adapter"):
            self.adapter(self.path.endswith("/load_lora_adapter"), body)
        else:
            self.reply(404, {"detail": "Not Found"})

    def adapter(self, load, body):
        if not body:
            return self.reply(400, {"error": "lora_name is needed"})
        if load:
            self.server.model.load(body["lora_name"], body["lora_path"])
        else:
            del self.server.model.adapters[body["lora_name"]]
        return self.reply(200, {})

    def fail(self, failure):
        if failure == "die":
            os._exit(3)
        if failure == "cut":
            self.connection.close()
        elif failure == "garbage":
            self.reply(200, {"choices": "none"})
        else:
            self.reply(int(failure), {"error": "not now"}, {"Retry-After": "1"} if failure == "429" else {})

    def complete(self, body):
        how, model = self.server.how, self.server.model
        name = body["model"].removeprefix(f"{how['name']}:") if how["engine"] == "sglang" else body["model"]
        if name not in (how["name"], *model.adapters):
            return self.reply(404, {"error": {"message": f"The model `{name}` does not exist."}})
        if set(body) != FIELDS or not all(type(token) is int for token in body["prompt"]):
            return self.reply(400, {"error": f"unknown or missing fields: {sorted(set(body) ^ FIELDS)}"})
        tokens = model.answer(name, body)
        choice = {"index": 0, "text": model.tokenizer.decode(tokens, skip_special_tokens=True)}
        if not how["text"]:
            choice["token_ids"] = tokens
        return self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"]) + how["miscount"]}})

    def reply(self, status, value, headers=None):
        text = json.dumps(value).encode()
        self.send_response(status)
        for key, each in ({"Content-Length": str(len(text))} | (headers or {})).items():
            self.send_header(key, each)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def main():
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    server.model, server.how, server.seen, server.lock = Model(Path(sys.argv[1])), dict(PLAIN), [], threading.Lock()
    print(f"running on http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
