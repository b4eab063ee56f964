# Shared by the scripts beside it. Sourced, never run.

BED=${VIRT_FLEECE_BED:-$HOME/.cache/virt-fleece-bed}
CLUSTER_SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# program NAME: prints its path. `KUBEBUILDER_ASSETS` comes first, as with the test environments of controllers in Go.
program() {
    local directory
    for directory in ${KUBEBUILDER_ASSETS:+"$KUBEBUILDER_ASSETS"} "$BED/cluster"; do
        [ ! -x "$directory/$1" ] || {
            echo "$directory/$1"
            return
        }
    done
    die "no $1: run tests/bed/setup cluster"
}

# enter [DIRECTORY]: goes into a prepared directory. All names below are relative to it.
enter() {
    [ -s "${1:-}/admin.kubeconfig" ] || die "$(basename "$0") DIRECTORY, which tests/cluster/prepare has made"
    cd -P "$1"
}

# kubectl as the administrator. It keeps what it caches in its home.
admin() { HOME=$PWD bin/kubectl --kubeconfig admin.kubeconfig --request-timeout 30s "$@"; }

# certificate NAME SUBJECT EXTENSION...: a key and a certificate that the authority of this directory signs. Without a
# configuration of its own, openssl's would make every certificate an authority.
certificate() {
    local name=$1 subject=$2 extensions=() signer=() extension
    shift 2
    for extension in "$@"; do extensions+=(-addext "$extension"); done
    [ "$name" = ca ] || signer=(-CA pki/ca.crt -CAkey pki/ca.key)
    openssl req -x509 -config <(printf '[req]\ndistinguished_name=dn\n[dn]\n') -newkey ec -nodes -days 365 \
        -pkeyopt ec_paramgen_curve:P-256 -subj "$subject" "${signer[@]}" "${extensions[@]}" \
        -keyout "pki/$name.key" -out "pki/$name.crt" 2>pki/openssl.log || {
        cat pki/openssl.log >&2
        die "openssl makes no certificate for $name"
    }
}

# kubeconfig NAME TO: of the certificate of that name; self-contained, so that it can be moved about.
kubeconfig() {
    cat >"$2" <<KUBECONFIG
apiVersion: v1
kind: Config
current-context: cluster
contexts:
- {name: cluster, context: {cluster: cluster, user: user}}
clusters:
- name: cluster
  cluster:
    server: https://127.0.0.1:$(cat port)
    certificate-authority-data: $(base64 -w0 pki/ca.crt)
users:
- name: user
  user:
    client-certificate-data: $(base64 -w0 "pki/$1.crt")
    client-key-data: $(base64 -w0 "pki/$1.key")
KUBECONFIG
}

# is_running NAME: whether the process of this directory's pid file still is that program, in this directory.
is_running() {
    local pid exe
    pid=$(cat "$1.pid" 2>/dev/null) && exe=$(readlink "/proc/$pid/exe") || return 1
    # The file may have been replaced by a newer build since.
    [ "$(readlink "/proc/$pid/cwd")" = "$PWD" ] && [ "$(basename "${exe% (deleted)}")" = "$1" ]
}
