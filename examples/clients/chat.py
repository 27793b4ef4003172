"""Ask a served model with the official client: pip install openai, then python examples/clients/chat.py."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("WEITIAO_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"),
)
model = client.models.list().data[0].id
question = {"role": "user", "content": "你好"}

# a reply; where the question is asked in the wording of a task, it has the labelled form
reply = client.chat.completions.create(model=model, messages=[question], max_tokens=64)
print(reply.choices[0].message.content)

# the same as it is written
for chunk in client.chat.completions.create(model=model, messages=[question], max_tokens=64, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# a form of one's own
person = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "friendly": {"type": "boolean"}},
    "required": ["name", "friendly"],
    "additionalProperties": False,
}
reply = client.chat.completions.create(
    model=model,
    messages=[question],
    max_tokens=128,
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": person}},
)
print(reply.choices[0].message.content)

# how sure the model is of each token
reply = client.chat.completions.create(model=model, messages=[question], max_tokens=4, logprobs=True, top_logprobs=2)
for token in reply.choices[0].logprobs.content:
    print(repr(token.token), round(token.logprob, 3))
