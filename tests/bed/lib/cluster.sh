# The programs of the test cluster (tests/cluster): etcd, kube-apiserver, kubectl and both Helms. One module of Go has
# them all as its tools, so that what they share is compiled once; its go.sum pins what they are built from.

CLUSTER_MODULE=$BED_SOURCE/../cluster

# cluster_packages: prints what is to be built: all but what `KUBEBUILDER_ASSETS` has.
cluster_packages() {
    local package name
    while read -r package; do
        name=$(cluster_name "$package")
        [ -n "${KUBEBUILDER_ASSETS:-}" ] && [ -x "$KUBEBUILDER_ASSETS/$name" ] || echo "$package"
    done < <(sed -n '/^tool (/,/^)/s/^\t//p' "$CLUSTER_MODULE/go.mod")
}

# The program that a package is.
cluster_name() {
    case $1 in
    go.etcd.io/etcd/server/*) echo etcd ;;
    helm.sh/helm/v3/*) echo helm3 ;;
    *) basename "$1" ;;
    esac
}

# cluster_program NAME: prints its path, where there is one.
cluster_program() {
    local directory
    for directory in ${KUBEBUILDER_ASSETS:+"$KUBEBUILDER_ASSETS"} "$BED/cluster"; do
        if [ -x "$directory/$1" ]; then
            echo "$directory/$1"
            return
        fi
    done
}

# cluster_version MODULE: the version that go.mod asks for.
cluster_version() { sed -n "s,^\t$1 \(v[^ ]*\)\$,\1,p" "$CLUSTER_MODULE/go.mod" | head -n 1; }

cluster_key() {
    local go
    go=$(go_program)
    key_of "$CLUSTER_MODULE"/go.{mod,sum} "$BED_SOURCE/lib/cluster.sh" <(cluster_packages) <(${go:+"$go" version})
}

cluster_is_current() { is_current cluster "$(cluster_key)"; }

build_cluster() {
    local work package version minor start=$SECONDS
    install_go cluster
    # It makes the certificates of every cluster.
    command -v openssl >/dev/null || {
        update_lists
        install_packages openssl
    }
    work=$(new_directory cluster)
    mkdir -p "$work/out"
    version=$(cluster_version k8s.io/kubernetes)
    minor=${version#v1.}
    minor=${minor%%.*}

    cd "$CLUSTER_MODULE"
    while read -r package; do
        say "cluster: fetching and compiling $(cluster_name "$package")"
        # The versions are what their makefiles pass. -mod=readonly adds nothing to go.sum.
        quietly run_go "$work" build -mod=readonly -buildvcs=false -trimpath -o "$work/out/$(cluster_name "$package")" \
            -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version \
                -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$minor \
                -X k8s.io/client-go/pkg/version.gitVersion=$version \
                -X helm.sh/helm/v3/internal/version.version=$(cluster_version helm.sh/helm/v3) \
                -X helm.sh/helm/v4/internal/version.version=$(cluster_version helm.sh/helm/v4)" "$package"
        # shellcheck disable=SC2046
        quietly "$work/out/$(cluster_name "$package")" $(cluster_version_arguments "$package")
    done < <(cluster_packages)
    cd /
    printf '%s\n' "$version" >"$work/out/version"
    publish cluster "$(cluster_key)" "$work/out"
    rm -rf "$work"
    say "cluster: done (Kubernetes $version, $(du -sh "$BED/cluster" | cut -f 1), $((SECONDS - start)) seconds)"
}

# How a program is asked for its version, which proves that it runs.
cluster_version_arguments() {
    case $1 in
    */helm) echo version ;;
    # Of the client alone: there is no server yet.
    */kubectl) echo version --client ;;
    *) echo --version ;;
    esac
}
