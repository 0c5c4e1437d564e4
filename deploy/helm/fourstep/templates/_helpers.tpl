{{/* The files are those of ../../kubernetes, linked: here they are changed as the overlays' patches do. */}}

{{/* base/environment.env with the values' changes, as a map in YAML. */}}
{{- define "fourstep.environment" -}}
{{- $found := fromYaml (include "fourstep.variables" (.Files.Get "files/environment.env")) -}}
{{- range $name, $value := .Values.environment -}}
{{- if kindIs "invalid" $value }}{{ $_ := unset $found $name }}{{ else }}{{ $_ := set $found $name (toString $value) }}{{ end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* What the Job is told of the model, as a map in YAML. */}}
{{- define "fourstep.model" -}}
{{- $found := fromYaml (include "fourstep.variables" (.Files.Get "files/model.env")) -}}
{{- range $name, $value := .Values.cache.model }}{{ $_ := set $found $name (toString $value) }}{{ end -}}
{{- toYaml (set $found "fill.sh" (.Files.Get "files/fill.sh")) -}}
{{- end -}}

{{/* NAME=VALUE lines as a map in YAML. */}}
{{- define "fourstep.variables" -}}
{{- range splitList "\n" . }}{{ if and . (not (hasPrefix "#" .)) }}{{ $pair := splitn "=" 2 . }}
{{ $pair._0 }}: {{ $pair._1 | quote }}
{{- end }}{{ end -}}
{{- end -}}

{{/* A changed map is a changed name, so that KubeRay makes a new cluster beside the old one. */}}
{{- define "fourstep.environmentName" -}}
fourstep-environment-{{ include "fourstep.environment" . | sha256sum | trunc 10 }}
{{- end -}}
{{- define "fourstep.modelName" -}}
fourstep-model-{{ include "fourstep.model" . | sha256sum | trunc 10 }}
{{- end -}}

{{/* A list of the context and objects in YAML: each in the release's namespace, with its image and names. */}}
{{- define "fourstep.objects" -}}
{{- $context := index . 0 -}}
{{- $image := printf "image: %s:%s\n" $context.Values.image.repository $context.Values.image.tag -}}
{{- $redis := printf "image: %s\n" $context.Values.gcsFaultTolerance.redisImage -}}
{{- $environment := printf "name: %s\n" (include "fourstep.environmentName" $context) -}}
{{- range splitList "\n---\n" (index . 1) }}
{{- $object := fromYaml . }}
{{- $_ := set $object.metadata "namespace" $context.Release.Namespace }}
---
{{ printf "%s\n" (toYaml $object) | replace "image: fourstep\n" $image | replace "image: redis\n" $redis | replace "name: fourstep-environment\n" $environment }}
{{- end }}
{{- end -}}
