#!/bin/sh
# The HTTP API by hand: a reply, then the agent behind it. Needs a running daemon: agentmem up
set -eu
url="${AGENTMEM_URL:-http://127.0.0.1:8377}"
token="$(agentmem token show)"

curl --silent --show-error --fail-with-body "$url/v1/chat/completions" \
  -H "Authorization: Bearer $token" -H "Content-Type: application/json" -H "X-AgentMem-Agent: traveller" \
  -d '{"model": "default", "temperature": 0, "max_tokens": 32,
       "messages": [{"role": "user", "content": "Name one city in Italy."}]}'
echo

curl --silent --show-error --fail-with-body "$url/v1/agents/traveller" -H "Authorization: Bearer $token"
echo
