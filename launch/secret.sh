# Gives the ranks that a script in launch/ starts a new secret, unless the user gave them one (docs/multinode.md).
[ "${BASH_SOURCE[0]}" != "$0" ] || { echo "Usage: source launch/secret.sh, as other scripts here do" && exit; }
if [ -z "${MEGACHAT_SECRET:-}${MEGACHAT_SECRET_FILE:-}" ]; then
    MEGACHAT_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export MEGACHAT_SECRET
fi
