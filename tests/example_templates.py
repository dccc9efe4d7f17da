"""Chat templates that use what published ones use, in short."""

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
DAY = 2024, 7, 26  # the day on which they say which day it is
SYSTEM = "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim -%}"
SYSTEM += "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
TEMPLATES = {
    "ChatML": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # a system prompt of its own, as in SmolLM2 and Qwen2.5
    "default system": """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>' ~ '\n' }}{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    # Llama 3.1: the date, and what a message says is trimmed
    "date and trim": "{{- bos_token }}\n"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
    + SYSTEM
    + """
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    # Qwen3: a namespace that outlives a loop, and earlier thoughts are left out
    "namespace and thoughts": """
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    # Mistral and Gemma: roles that must alternate, and a system message that is part of the first turn
    "alternating": SYSTEM
    + """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate: user, assistant, user') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') }}
{{- message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
{% endfor %}""",
    # DeepSeek V3: one pass gathers, the next writes
    "two passes": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}\
{% set ns.is_first_sp = false %}{%- else %}\
{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}\
{{ bos_token }}{{ ns.system_prompt }}\
{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<|User|>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{{'<|Assistant|>' + message['content'] + '<|end|>'}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{'<|Assistant|>'}}{% endif %}""",
    # Kimi K2: macros
    "macros": """{%- macro name(role) -%}<|im_{{ role }}|>{{ role }}<|im_middle|>{%- endmacro -%}
{%- macro turn(message) -%}
    {{ name(message.role) }}
    {%- if message.content is string %}{{ message['content'] }}
    {%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif -%}<|im_end|>
{%- endmacro -%}
{%- for message in messages -%}
    {%- if loop.first and messages[0]['role'] != 'system' -%}
        {{ turn({"role": "system", "content": "You are an assistant."}) }}
    {%- endif -%}
    {{ turn(message) }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ name("assistant") }}{%- endif -%}""",
    # filters, tests, joins, tojson, break and continue, generation
    "the rest": """{%- set roles = {"user": "Q", "assistant": "A"} -%}
{%- for message in messages -%}
  {%- if message.role not in roles -%}{{ message | tojson(indent=2) }}{% continue %}{%- endif -%}
  {%- if loop.index > 20 -%}{% break %}{%- endif -%}
  {{ roles[message.role] }}{{ ": " if loop.first else loop.cycle(" | ", " / ") -}}
  {% generation %}{{ message.content.strip().replace("cat", "dog") | upper if loop.last else message.content }}
  {%- endgeneration %}
{% endfor -%}
{{ messages | map(attribute="role") | join(", ") }}
{{ messages | selectattr("role", "equalto", "user") | list | length }}
{%- if add_generation_prompt %}
A:{% endif %}
""",
}
