"""A served model in LangChain: pip install langchain-openai, then python examples/clients/langchain_chain.py."""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(
    base_url=os.environ.get("WEITIAO_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"),
    model=os.environ.get("WEITIAO_MODEL", "demo"),
    max_tokens=128,
    temperature=0,
)
chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | llm
print(chain.invoke({"question": "你好"}).content)
for piece in chain.stream({"question": "你好"}):
    print(piece.content, end="", flush=True)
print()

schema = {
    "title": "person",
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "friendly": {"type": "boolean"}},
    "required": ["name", "friendly"],
    "additionalProperties": False,
}
print(llm.with_structured_output(schema, method="json_schema").invoke("你好"))
