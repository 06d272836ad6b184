"""Fields of requests with values that nobody means well, by name."""

from __future__ import annotations

import json
from typing import Any

HUGE = 10**9
_SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
_BOMB = r"(a+)+$|(a|a)*b|([a-zA-Z]+)*c|(.*.*.*.*)*"

SAMPLING: dict[str, dict[str, Any]] = {
    "n": {"n": HUGE},
    "n of 0": {"n": 0},
    "negative n": {"n": -1},
    "n as text": {"n": "1e9"},
    "logprobs": {"logprobs": HUGE},
    "logprobs as a boolean": {"logprobs": True, "top_logprobs": HUGE},
    "negative logprobs": {"logprobs": -2},
    "all logprobs": {"logprobs": -1},
    "prompt_logprobs": {"prompt_logprobs": HUGE},
    "negative prompt_logprobs": {"prompt_logprobs": -2},
    "max_tokens": {"max_tokens": 10**18},
    "max_tokens beyond 64 bits": {"max_tokens": 10**40},
    "max_tokens of 0": {"max_tokens": 0},
    "negative max_tokens": {"max_tokens": -1},
    "min_tokens over max_tokens": {"min_tokens": 5, "max_tokens": 2},
    "min_tokens": {"min_tokens": 10**40},
    "negative seed": {"seed": -1},
    "seed beyond 64 bits": {"seed": 2**64},
    "least seed": {"seed": -(2**63)},
    "less than the least seed": {"seed": -(2**63) - 1},
    "temperature": {"temperature": 1e308},
    "negative temperature": {"temperature": -1},
    "temperature, NaN": {"temperature": float("nan")},
    "temperature, infinite": {"temperature": float("inf")},
    "top_p, NaN": {"top_p": float("nan")},
    "top_k": {"top_k": 10**40},
    "top_k of -2": {"top_k": -2},
    "min_p": {"min_p": 2},
    "penalties": {"presence_penalty": 1e30, "frequency_penalty": float("-inf")},
    "repetition_penalty of 0": {"repetition_penalty": 0},
    "repetition_penalty, NaN": {"repetition_penalty": float("nan")},
    "100,000 stop strings": {"stop": [f"s{i}" for i in range(100_000)]},
    "an empty stop string": {"stop": ""},
    "a long stop string": {"stop": "x" * 1_000_000},
    "a surrogate as a stop string": {"stop": "\ud800"},
    "stop tokens out of the vocabulary": {"stop_token_ids": [HUGE, -1, 2**70]},
    "logit_bias out of the vocabulary": {"logit_bias": {"999999999": 5}},
    "negative logit_bias": {"logit_bias": {"-5": 5}},
    "logit_bias of no token": {"logit_bias": {"a": 5}},
    "logit_bias, NaN": {"logit_bias": {"1": float("nan")}},
    "20,000 biases": {"logit_bias": {str(i): 1 for i in range(20_000)}},
    "allowed tokens out of the vocabulary": {"allowed_token_ids": [HUGE]},
    "no allowed token": {"allowed_token_ids": []},
    "negative allowed tokens": {"allowed_token_ids": [-1]},
    "bad words": {"bad_words": ["", " ", "\ud800", "x" * 100_000]},
    "truncation to more": {"truncate_prompt_tokens": HUGE},
    "truncation to less than -1": {"truncate_prompt_tokens": -5},
    "truncation to nothing": {"truncate_prompt_tokens": 0},
    "beam search": {"use_beam_search": True, "n": 300},
    "beam search of 0": {"use_beam_search": True, "n": 0},
    "beam search with sound numbers": {"use_beam_search": True, "n": 2, "temperature": 0},
    "vllm_xargs": {"vllm_xargs": {"a": [1, "b"], "": ""}},
    "kv_transfer_params": {
        "kv_transfer_params": {"remote_host": "127.0.0.1", "remote_port": 1, "do_remote_prefill": True}
    },
    "a salt of nothing": {"cache_salt": ""},
    "a salt with a surrogate": {"cache_salt": "\ud800"},
    "a priority": {"priority": -(10**30)},
    "a request id": {"request_id": "x" * 100_000},
    "another model": {"model": "/a" * 500_000},
    "a model that is no text": {"model": {"a": []}},
    "a watermark": {"watermarking": True},
    "a thinking budget": {"thinking_token_budget": -5},
    "tokens to force": {"trace_decode_token_ids": [HUGE]},
    "detection of repetitions": {
        "repetition_detection": {"max_pattern_size": HUGE, "min_pattern_size": -1, "min_count": 0}
    },
    "stream options without a stream": {"stream_options": {"include_usage": True}},
    "stream options of another type": {"stream": True, "stream_options": []},
    "multi-modal arguments": {"mm_processor_kwargs": {"a": 1}, "media_io_kwargs": {"image": {"x": 1}}},
    "data parallel rank": {"data_parallel_rank": 7},
}
STRUCTURED: dict[str, dict[str, Any]] = {
    name: {"structured_outputs": value}
    for name, value in {
        "a regex that explodes": {"regex": _BOMB},
        "a regex with a great count": {"regex": "(a{1,1000}){1,1000}"},
        "a regex that doesn't close": {"regex": "(a"},
        "a regex with lookahead": {"regex": "(?=a)b"},
        "a regex of 100,000 characters": {"regex": "a" * 100_000},
        "a regex of 20,000,000 characters": {"regex": "a" * 20_000_000},
        "a regex of a surrogate": {"regex": "\ud800"},
        "nested groups": {"regex": "(" * 5000 + "a" + ")" * 5000},
        "a grammar that is none": {"grammar": "root ::= ("},
        "a grammar without an end": {"grammar": 'root ::= root "a"'},
        "a grammar without a root": {"grammar": 'x ::= "a"'},
        "a grammar that refers to nothing": {"grammar": "root ::= nothing"},
        "a grammar of nested groups": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
        "Lark": {"grammar": "start: /(a+)+$/"},
        "a schema of an unknown type": {"json": {"type": "nothing"}},
        "a schema that is no schema": {"json": "[1"},
        "a schema that refers to itself": {"json": {"$ref": "#"}},
        "a schema that refers to nowhere": {"json": {"$ref": "#/x/y"}},
        "a schema that refers to a site": {"json": {"$ref": "http://127.0.0.1:9/x.json"}},
        "a schema that refers to a file": {"json": {"$ref": "file:///etc/passwd"}},
        "a schema with a regex that explodes": {"json": {"type": "string", "pattern": _BOMB}},
        "a schema with great counts": {"json": {"type": "array", "items": {"type": "string"}, "minItems": HUGE}},
        "a schema with great lengths": {"json": {"type": "string", "minLength": HUGE, "maxLength": HUGE}},
        "a schema with wrong counts": {"json": {"type": "array", "minItems": -1, "maxItems": -5}},
        "a schema of 10,000 fields": {
            "json": {"type": "object", "properties": {f"f{i}": {"type": "string"} for i in range(10_000)}}
        },
        "a deep schema": {"json": "{" + ('"items":{' * 2000) + "}" * 2001},
        "an enumeration of 100,000": {"json": {"enum": list(range(100_000))}},
        "an empty enumeration": {"json": {"enum": []}},
        "no choice": {"choice": []},
        "100,000 choices": {"choice": [f"c{i}" for i in range(100_000)]},
        "a choice of nothing": {"choice": [""]},
        "choices with quotes": {"choice": ['a"b', "\\", "\n", "\ud800"]},
        "two at once": {"regex": "a", "choice": ["a"]},
        "nothing": {},
        "a structural tag": {"structural_tag": "{}"},
        "a structural tag that is none": {"structural_tag": "[["},
        "a structural tag with a schema that is none": {
            "structural_tag": json.dumps(
                {"structures": [{"begin": "<a>", "schema": {"type": "x"}, "end": "</a>"}], "triggers": ["<"]}
            )
        },
        "another backend": {"regex": "a", "_backend": "nothing", "backend": "outlines"},
        "white space": {"json": _SCHEMA, "whitespace_pattern": _BOMB},
    }.items()
} | {
    "a response format of an unknown type": {"response_format": {"type": "nothing"}},
    "a response format without a schema": {"response_format": {"type": "json_schema"}},
    "a response format with a wrong schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}
    },
    "a structural tag as a response format": {
        "response_format": {"type": "structural_tag", "structures": [], "triggers": []}
    },
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "best_of": {"best_of": HUGE},
    "a suffix": {"suffix": "x"},
    "echo of nothing": {"echo": True, "max_tokens": 0, "logprobs": 0},
    "echo with log-probabilities": {"echo": True, "logprobs": 3},
    "embeddings that are none": {"prompt_embeds": "aGVsbG8="},
    "embeddings that are no base64": {"prompt_embeds": "***", "prompt": None},
    "embeddings beside nothing": {"prompt_embeds": ["aGVsbG8="], "prompt": []},
    "token ids": {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1},
}
_MESSAGES: dict[str, Any] = {
    "none": [],
    "no list": "hello",
    "no content": [{"role": "user"}],
    "content that is nothing": [{"role": "user", "content": None}],
    "an assistant's without content": [{"role": "assistant"}],
    "an unknown role": [{"role": "\ud800", "content": "x"}],
    "a surrogate": [{"role": "user", "content": "\ud800"}],
    "a zero": [{"role": "user", "content": "\x00"}],
    "a turn's end": [{"role": "user", "content": "<|eos|><|turn|><|pad|>"}],
    "1,000,000 characters": [{"role": "user", "content": "x" * 1_000_000}],
    "10,000": [{"role": "user", "content": "x"}] * 10_000,
    "a picture by address": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]}
    ],
    "a picture that is a file": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
    ],
    "a picture that is none": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
    ],
    "sound": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}]}],
    "a part of an unknown type": [{"role": "user", "content": [{"type": "nothing"}]}],
    "parts that are no parts": [{"role": "user", "content": [1, None, []]}],
    "a tool's answer to nothing": [{"role": "tool", "content": "x", "tool_call_id": "y"}],
    "calls of tools that are none": [{"role": "assistant", "tool_calls": [{}, 5]}],
    "a call with arguments that are no JSON": [
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}],
        }
    ],
    "a call with arguments that are NaN": [
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "NaN"}}],
        }
    ],
    "calls that are nothing": [{"role": "assistant", "tool_calls": None, "content": []}],
    "a developer": [{"role": "developer", "content": "x", "tools": [{}]}],
    "fields of the template": [{"role": "user", "content": "{{ 7 * 7 }}{% for i in range(10**9) %}{% endfor %}"}],
}
CHATS: dict[str, dict[str, Any]] = {
    **{f"messages: {name}": {"messages": messages} for name, messages in _MESSAGES.items()},
    "a template": {"chat_template": "{{ messages }}"},
    "a template that never ends": {"chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}"},
    "a template that is none": {"chat_template": "{% for"},
    "arguments of the template": {
        "chat_template_kwargs": {"chat_template": "{{ 1 }}", "tokenize": False, "messages": 5}
    },
    "arguments of the template that are not its": {
        "chat_template_kwargs": {"conversation": [], "padding": "x", "return_tensors": "pt"}
    },
    "documents": {"documents": [{"a": {}}]},
    "no generation prompt, and a message to go on with": {
        "add_generation_prompt": True,
        "continue_final_message": True,
    },
    "tools": {"tools": [_TOOL]},
    "a tool that is required": {"tools": [_TOOL], "tool_choice": "required"},
    "a tool that is named": {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    "a tool that isn't there": {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "tools of Anthropic's": {
        "tools": [{"name": "f", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
    },
    "a tool that must be called, without tools": {"tool_choice": "required"},
    "a tool without parameters": {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
    },
    "a tool with a wrong schema": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
        "tool_choice": "required",
    },
    "a tool with references that go round": {
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
            }
        ],
        "tool_choice": "required",
    },
    "a tool with definitions that are none": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$defs": 5}}}],
        "tool_choice": "required",
    },
    "a tool without a name": {"tools": [{"type": "function", "function": {"name": ""}}], "tool_choice": "required"},
    "the same tool twice": {"tools": [_TOOL, _TOOL], "tool_choice": "required"},
    "1,000 tools": {"tools": [_TOOL] * 1000, "tool_choice": "required"},
    "tools that are none": {"tools": [5], "tool_choice": "auto"},
    "no tools": {"tools": [], "tool_choice": "auto"},
    "a tool and a format": {"tools": [_TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
    "an effort": {"reasoning_effort": "enormous"},
    "a stream with usage each time": {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "echo": {"echo": True, "logprobs": True, "top_logprobs": 3},
}
RESPONSES: dict[str, dict[str, Any]] = {
    "no input": {"input": []},
    "input that is nothing": {"input": None},
    "items that are none": {"input": [{}, {"type": "nothing"}]},
    "a response before it that isn't there": {"previous_response_id": "resp_nothing"},
    "a response before it with a wrong id": {"previous_response_id": "\ud800"},
    "in the background": {"background": True, "store": True},
    "in the background, not stored": {"background": True, "store": False},
    "tools": {"tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}], "tool_choice": "required"},
    "tools of the server's": {
        "tools": [{"type": "web_search_preview"}, {"type": "code_interpreter", "container": {"type": "auto"}}]
    },
    "a server of tools": {"tools": [{"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:9"}]},
    "a tool that is required": {"tool_choice": {"type": "function", "name": "g"}},
    "a format": {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}},
    "truncation": {"truncation": "auto", "input": "x" * 100_000},
    "truncation off": {"truncation": "disabled", "input": "x " * 100_000},
    "max_output_tokens": {"max_output_tokens": 10**40},
    "max_tool_calls": {"max_tool_calls": -1},
    "top_logprobs": {"top_logprobs": HUGE, "include": ["message.output_text.logprobs"]},
    "log-probabilities": {"top_logprobs": 2, "include": ["message.output_text.logprobs"], "max_output_tokens": 3},
    "a stream": {"stream": True, "max_output_tokens": 3},
    "a stream with tools": {
        "stream": True,
        "max_output_tokens": 3,
        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
        "tool_choice": "required",
    },
    "calls of tools": {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
    "an answer of a tool": {"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]},
    "reasoning": {"input": [{"type": "reasoning", "id": "a", "summary": [], "content": []}]},
    "an item by reference": {"input": [{"type": "item_reference", "id": "a"}]},
    "metadata": {"metadata": {"a": "x" * 100_000}},
    "instructions of a surrogate": {"instructions": "\ud800"},
}
PROMPTS: dict[str, Any] = {
    "nothing": None,
    "an empty text": "",
    "an empty list": [],
    "an empty list in a list": [[]],
    "ids out of the vocabulary": [10**6],
    "an id beyond 32 bits": [2**33],
    "an id beyond 64 bits": [2**70],
    "a negative id": [-1],
    "one more than the vocabulary": [384],
    "ids and texts": [1, "a"],
    "ids of another type": [1.5, True],
    "a list of 20,000 texts": ["x"] * 20_000,
    "100,000 ids": [1] * 100_000,
    "a long text": "a" * 200_000,
    "a surrogate": "\ud800",
    "zeros": "\x00" * 1000,
    "special tokens": "<|eos|>" * 100,
    "a number": 5,
    "a mapping": {"prompt_token_ids": [1]},
    "paths": "/a" * 200_000,
}
