"""ChatGLM-6B (v1.1), ChatGLM2-6B, ChatGLM3-6B: configurations, networks, tokenizers, prompts.

A save puts the files named *_chatglm*.py, and those beside them that they import, next to the weights (auto_map), for programs
without Sanbu. These files import nothing of Sanbu's but each other, and raise ValueError; registration.py makes it UserError.
"""
