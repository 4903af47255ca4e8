"""The openai package against the daemon. Run it twice: the second time the agent remembers the first.

pip install openai && agentmem up && python examples/openai_client.py
"""

from openai import OpenAI

from agentmem.daemon import find_endpoint

daemon = find_endpoint()  # reads the address and the token out of the home folder
client = OpenAI(base_url=f"{daemon.url}/v1", api_key=daemon.token)

stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    temperature=0,
    max_tokens=32,
    stream=True,
    stream_options={"include_usage": True},
    prompt_cache_key="geographer",  # names the agent; any OpenAI client can send it
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage and chunk.usage.prompt_tokens_details:
        cached = chunk.usage.prompt_tokens_details.cached_tokens
        print(f"\n({cached} of {chunk.usage.prompt_tokens} prompt tokens were remembered)")
