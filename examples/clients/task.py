"""Typed answers of a served model, without any package: python examples/clients/task.py TEXT."""

import json
import os
import sys
from urllib.request import Request, urlopen

URL = os.environ.get("WEITIAO_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "EMPTY")


def ask(route: str, body: dict | None = None) -> dict:
    """The JSON that a route answers."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(URL + route, data=data, headers=headers), timeout=300) as response:
        return json.load(response)


text = sys.argv[1] if len(sys.argv) > 1 else "去年王安搬到了北京。"
for task in ask("/tasks")["data"]:
    answer = ask(f"/tasks/{task['id']}", {"text": text, "model": task["model"]})
    print(f"{task['id']}: {json.dumps(answer['answer'], ensure_ascii=False)}")
    if not answer["valid"]:
        print(f"  no answer: {answer['reason']}")
    for field in answer["fields"]:
        print(f"  {field['confidence']:.2f}  {field['path'] or 'answer'} = {field['value']}")
