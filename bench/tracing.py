#!/usr/bin/env python3
"""What tracing costs: decode speed of one stream with tracing off, at 1 % and full, in one run.

    bench/tracing.py target/release/shoal [--rounds 15] [--tokens 400] [--model DIR]

Clusters of one gateway, one router and two expert servers stand side by side and are asked in turn: without a collector;
with one, at 1 %, with all requests, with every step of them; and with a collector that is down or that accepts and never
answers. The collector is this script: it takes OTLP over HTTP and throws it away, on the same cores. Prints the
median over the rounds of tokens a second after the first token, its spread, and the ratio to tracing off.
"""
import argparse, http.client, http.server, json, socket, statistics, subprocess, sys, threading, time


class Sink(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def up(shoal, model, flags):
    command = [shoal, "up", "--json", "--listen", "127.0.0.1:0", "--experts", "2", *flags]
    if model:
        command += ["--model", model]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    members = json.loads(child.stdout.readline())["members"]
    address = next(member["address"] for member in members if member["name"] == "gateway")
    return child, address


def decode_speed(address, tokens, headers):
    body = json.dumps({"model": MODEL, "prompt": "What is 348 + 277?", "max_tokens": tokens, "ignore_eos": True,
                       "stream": True, "temperature": 0})
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first = last = None
    n = 0
    for line in response:
        if line.startswith(b"data: {"):
            last = time.perf_counter()
            first = first or last
            n += 1
    return (n - 1) / (last - first)


parser = argparse.ArgumentParser()
parser.add_argument("shoal")
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--tokens", type=int, default=400)
parser.add_argument("--model")
args = parser.parse_args()
MODEL = "minnow" if not args.model else args.model.rstrip("/").rsplit("/", 1)[-1]

sink = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
threading.Thread(target=sink.serve_forever, daemon=True).start()
collector = f"http://127.0.0.1:{sink.server_port}/v1/traces"
silent = socket.create_server(("127.0.0.1", 0), backlog=64)
with socket.create_server(("127.0.0.1", 0)) as closed:
    nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/v1/traces"
hanging = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
full = {"x-shoal-trace": "full"}
modes = {
    "off": ([], {}),
    "1 %": ([f"--otlp={collector}", "--trace-sample=0.01"], {}),
    "default: all requests, some steps": ([f"--otlp={collector}"], {}),
    "default, collector down": ([f"--otlp={nobody}"], {}),
    "default, collector hangs": ([f"--otlp={hanging}"], {}),
    "full": ([f"--otlp={collector}"], full),
    "full, collector hangs": ([f"--otlp={hanging}"], full),
}
clusters = {}
try:
    for mode, (flags, headers) in modes.items():
        clusters[mode] = (*up(args.shoal, args.model, flags), headers)
    speeds = {mode: [] for mode in modes}
    for turn in range(args.rounds + 1):
        order = list(modes)
        # Each goes first as often as the others.
        for mode in order[turn % len(order):] + order[: turn % len(order)]:
            _, address, headers = clusters[mode]
            speed = decode_speed(address, args.tokens, headers)
            if turn > 0:
                speeds[mode].append(speed)
finally:
    for child, _, _ in clusters.values():
        child.terminate()
    for child, _, _ in clusters.values():
        child.wait()
base = statistics.median(speeds["off"])
print(f"{'tracing':36} {'tokens/s':>9} {'quartiles':>13} {'of off':>7}")
for mode, values in speeds.items():
    low, median, high = statistics.quantiles(values, n=4)
    print(f"{mode:36} {median:9.0f} {low:6.0f}-{high:<6.0f} {median / base:7.3f}")
