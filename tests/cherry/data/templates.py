"""Chat templates of the shapes that released models have, and a tokenizer with all of their control tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["the quick brown fox jumps over the lazy dog", "def main(argv):\n    return 0\n", "naïve café 🙂 日本"] * 4
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"]
NOT_SPECIAL = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_system|>"]

_TURNS = "{% for m in messages %}"
V3 = (
    "{% set ns = namespace(system='', first=true) %}" + _TURNS + "{% if m['role'] == 'system' %}"
    "{% if ns.first %}{% set ns.system = m['content'] %}{% set ns.first = false %}"
    "{% else %}{% set ns.system = ns.system + '\\n\\n' + m['content'] %}{% endif %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    + _TURNS
    + "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
V31 = (
    "{{ bos_token }}" + _TURNS + "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' }}{{ '</think>' }}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>', 1)[1] %}{% endif %}{{ content + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜></think>' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}" + _TURNS + "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    + _TURNS
    + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content %}{{ m.content | trim }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
KIMI = (
    _TURNS
    + "{% if loop.first and m['role'] != 'system' %}<|im_system|>system<|im_middle|>Be kind.<|im_end|>{% endif %}"
    "{% if m['role'] == 'user' %}<|im_user|>{{ m.get('name') or m['role'] }}<|im_middle|>"
    "{% elif m['role'] == 'assistant' %}<|im_assistant|>{{ m.get('name') or m['role'] }}<|im_middle|>"
    "{% else %}<|im_system|>{{ m['role'] }}<|im_middle|>{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
MARKED = (
    "{{ bos_token }}" + _TURNS + "{% if m.role == 'assistant' %}<|im_assistant|>"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}<|im_user|>{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
REASONING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _TURNS
    + "{{ '<|im_start|>' + m.role + '\\n' }}{% set content = m.content %}{% set reasoning = '' %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% endif %}"
    "{% if reasoning and loop.index0 > ns.last %}{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{% endif %}{{ content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALL = {"v3": V3, "v31": V31, "r1": R1, "chatml": CHATML, "kimi": KIMI, "marked": MARKED, "reasoning": REASONING}


def tokenizer() -> Tokenizer:
    """Byte-level BPE with bos 0 and eos 1; control tokens of both kinds, special and not."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens([AddedToken(name, special=False, normalized=True) for name in NOT_SPECIAL])
    return made
