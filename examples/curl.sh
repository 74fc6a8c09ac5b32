#!/bin/sh
# Chat, stream, tiers and a plan switch, by hand.
set -eu
URL=${NITSUM_URL:-http://127.0.0.1:8000}
JSON='content-type: application/json'

echo "--- an answer, as priority; the headers say where it ran"
curl -sS --fail-with-body -D - "$URL/v1/chat/completions" -H "$JSON" -d '{
  "messages": [{"role": "user", "content": "Name three rivers."}],
  "max_tokens": 24, "service_tier": "priority"}' | grep -iE '^x-nitsum|^\{'

echo "--- the same as a stream, as flex"
curl -sSN --fail-with-body "$URL/v1/chat/completions" -H "$JSON" -d '{
  "messages": [{"role": "user", "content": "Name three rivers."}],
  "max_tokens": 8, "stream": true, "service_tier": "flex"}'

echo "--- to another plan, while requests go on"
PLAN=$(curl -sS "$URL/admin/plans" | sed 's/.*"plans":\["[^"]*","\([^"]*\)".*/\1/')
curl -sS --fail-with-body "$URL/admin/plans/switch" -H "$JSON" -d "{\"plan\": \"$PLAN\"}"
echo
