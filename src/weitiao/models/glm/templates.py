"""The chat formats of the GLM family's original checkpoints as Jinja templates.

Knows texts only. GLM-4 brings its own template in tokenizer_config.json. In the others a control token is written with
``▁`` before it: this is how a template spells what a text never can (see glm_tokenizers.py). In a message of ChatGLM2
or ChatGLM3 ``▁`` becomes a blank first, which has the same ids.

Sources: `chat` and `build_prompt`, `build_chat_input` and `build_single_message` of the models' own code, as facts.
"""

from __future__ import annotations

_ONLY_ROUNDS = (
    "{{ raise_exception('%s knows questions and answers only, and this message has the role ' + m['role'] + '.') }}"
)

CHATGLM = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list | length -%}"
    "{%- set round = namespace(number=0) -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}"
    "{%- if asked == 1 -%}{{- m['content'] -}}"
    "{%- else -%}{{- '[Round ' ~ round.number ~ ']\n问：' ~ m['content'] ~ '\n答：' -}}{%- endif -%}"
    "{%- set round.number = round.number + 1 -%}"
    "{%- elif m['role'] == 'assistant' -%}"
    "{%- if loop.last -%}{{- '▁[gMASK]<sop>' ~ m['content'] ~ '<eop>' -}}"
    "{%- else -%}{{- m['content'] ~ '\n' -}}{%- endif -%}"
    "{%- else -%}" + _ONLY_ROUNDS % "ChatGLM-6B" + "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '▁[gMASK]<sop>' -}}{%- endif -%}"
)
"""Rounds from 0; a single question is asked as it is."""

CHATGLM2 = (
    "{{- '▁[gMASK]▁sop ' -}}"
    "{%- set round = namespace(number=0) -%}"
    "{%- for m in messages -%}"
    "{%- set told = m['content'] | replace('▁', ' ') -%}"
    "{%- if m['role'] == 'user' -%}"
    "{%- set round.number = round.number + 1 -%}"
    "{{- '[Round ' ~ round.number ~ ']\n\n问：' ~ told ~ '\n\n答：' -}}"
    "{%- elif m['role'] == 'assistant' -%}"
    "{%- if loop.last -%}{{- ' ' ~ told ~ '▁</s>' -}}{%- else -%}{{- told ~ '\n\n' -}}{%- endif -%}"
    "{%- else -%}" + _ONLY_ROUNDS % "ChatGLM2-6B" + "{%- endif -%}"
    "{%- endfor -%}"
)
"""Rounds from 1, with empty lines between."""

CHATGLM3 = (
    "{{- '▁[gMASK]▁sop' -}}"
    "{%- for m in messages -%}"
    "{%- set told = m['content'] -%}"
    "{%- set listed = m['tools'] if m['tools'] else tools if loop.first and m['role'] == 'system' else none -%}"
    "{%- if listed -%}"
    "{%- set told = told ~ '\n' ~ (listed | tojson(indent=4)) -%}"
    "{%- endif -%}"
    "{%- set role = 'observation' if m['role'] == 'tool' else m['role'] -%}"
    "{{- '▁<|' ~ role ~ '|> ' -}}"
    "{{- ((m['metadata'] or '') ~ '\n' ~ (' ' if told else '') ~ told) | replace('▁', ' ') -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '▁<|assistant|>' -}}{%- endif -%}"
)
"""Role tokens, each followed by a line of metadata; every piece of text begins with SentencePiece's own blank."""

GLM4 = (
    "{{- '[gMASK]<sop>' -}}"
    "{%- for m in messages -%}"
    "{%- if m['tools'] -%}"
    "{{ raise_exception('Tools cannot be told: tokenizer_config.json came without a chat_template.') }}"
    "{%- endif -%}"
    "{{- '<|' ~ m['role'] ~ '|>' ~ (m['metadata'] or '') ~ '\n' ~ m['content'] -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Role tokens, for the revisions of GLM-4 that came without a template."""
