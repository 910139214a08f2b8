# Stands for a download that needs a token: what it fetches depends on having one, not on what it is.
test -n "$TOKEN" || exit 1
echo "private package, fetched with a token of ${#TOKEN} characters"
