"""Talk to a persona as to ChatGPT: weitiao serve chatglm3-6b=runs/persona --port 8002, then this."""

import os

from openai import OpenAI

client = OpenAI(api_key="EMPTY", base_url=os.environ.get("WEITIAO_URL", "http://127.0.0.1:8002/v1/"))
messages = [{"role": "user", "content": "你好啊"}]
stream = client.chat.completions.create(
    model="chatglm3-6b",
    messages=messages,
    stream=True,
    max_tokens=256,
    temperature=0.8,
    presence_penalty=1.1,
    top_p=0.8,
)
for chunk in stream:
    print(chunk.choices[0].delta.content, end="", flush=True)
print()
